"""What a span of tokens leaves behind, without its outputs: an element of `resettable(DECAY)`."""

import math

import jax
import jax.numpy as jnp

from ..documents import last_document
from .reference import exp, times


def summarize(u, log_decay, reset, state):
    """(flag (B,), (log (B, P), x (B, *S, P))), pairs; `state` gives shape and dtype.

    x = sum_t exp(sum of the logs after t) u_t over the tokens of the span's last document. Nothing
    is kept for the gradient but u and the weights, one a token and channel: no second x. Angles
    are added within a turn, for one of a thousand radians has lost its fourth decimal.
    """
    (batch, time), channels, exact = u[0].shape[:2], u[0].shape[-1], state[0].dtype

    def by_token(log):
        return jnp.broadcast_to(log.astype(exact), (batch, time, channels))

    logs = jax.tree.map(by_token, log_decay)
    flag, (u, logs) = last_document(reset, (u, logs))

    def earlier(after, log):
        return (after[0] + log[0], within(after[1] + within(log[1]))), after

    zeros = (jnp.zeros((batch, channels), exact),) * 2
    logs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), logs)
    total, after = jax.lax.scan(earlier, zeros, logs, reverse=True)
    flat = jax.tree.map(lambda x: x.reshape(batch, time, -1, channels), u)
    x = _weighted(exp(after), flat)
    return flag, (total, jax.tree.map(lambda x, like: x.reshape(like.shape), x, state))


@jax.custom_vjp
def _weighted(weights, u):
    """x = sum_t w_t u_t: weights (T, B, P), u (B, T, M, P), x (B, M, P), in the weights' dtype."""
    exact = weights[0].dtype

    def add(x, i):
        token = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, False), u)
        token = jax.tree.map(lambda x: x.astype(exact), token)
        weight = jax.tree.map(lambda w: w[i][:, None], weights)
        return jax.tree.map(jnp.add, x, times(weight, token)), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0], exact), u)
    return jax.lax.scan(add, zeros, jnp.arange(u[0].shape[1], dtype=jnp.int32))[0]


def _forward(weights, u):
    return _weighted(weights, u), (weights, u)


def _backward(residuals, dx):
    weights, u = residuals
    by_row = jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1)[:, :, None], weights)
    wide = jax.tree.map(lambda x: x[:, None], dx)
    du = times((by_row[0], -by_row[1]), wide)
    dw = times((u[0].astype(dx[0].dtype), -u[1].astype(dx[0].dtype)), wide)
    return (
        jax.tree.map(lambda x: jnp.moveaxis(x.sum(2), 1, 0), dw),
        jax.tree.map(lambda x: x.astype(u[0].dtype), du),
    )


_weighted.defvjp(_forward, _backward)


def within(angle):
    """The same angle between -pi and pi, with 2 pi in two parts: turns of the first are exact."""
    turns = jnp.round(angle / (2 * math.pi))
    return angle - turns * 6.28125 - turns * (2 * math.pi - 6.28125)
