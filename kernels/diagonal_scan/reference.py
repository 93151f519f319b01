"""The diagonal scan as the monoid says it: every token is its own summary.

A complex number is a pair (real, imaginary): a complex dtype compiles ten times as long on a CPU.
"""

import jax
import jax.numpy as jnp

from .. import monoid


def exp(log):
    """exp of a pair."""
    size = jnp.exp(log[0])
    return size * jnp.cos(log[1]), size * jnp.sin(log[1])


def times(a, x):
    """The product of two pairs."""
    return a[0] * x[0] - a[1] * x[1], a[0] * x[1] + a[1] * x[0]


def scale(log, x):
    """exp(log) x: log (..., P), x (..., *S, P), spread over the payload axes S."""

    def spread(part):
        between = (1,) * (x[0].ndim - part.ndim)
        return part.reshape(*part.shape[:-1], *between, part.shape[-1])

    return times(jax.tree.map(spread, exp(log)), x)


DECAY = monoid.decay(scale)
"""(log (..., P), x (..., *S, P)), both pairs."""


def diagonal_scan(u, log_decay, state, reset, chunk, schedule=monoid.scan):
    """The token recurrence; `chunk` has no meaning here and is not read."""
    del chunk
    batch, time, *_, channels = u[0].shape
    dtype, exact = u[0].dtype, state[0].dtype

    def by_token(log):
        return jnp.moveaxis(jnp.broadcast_to(log, (batch, time, channels)), 1, 0)

    log = jax.tree.map(by_token, log_decay)
    elements = log, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(exact), u)
    prefix = jax.tree.map(lambda x: jnp.zeros_like(x[0]), log), state
    if reset is None:
        _, x = schedule(DECAY, elements, prefix)
    else:
        start = jnp.zeros_like(reset[:, 0])
        rule = monoid.resettable(DECAY)
        _, (_, x) = schedule(rule, (reset.T, elements), (start, prefix))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).astype(dtype), x), (x[0][-1], x[1][-1])


def diagonal_scan_associative(u, log_decay, state, reset, chunk):
    """The same elements by `lax.associative_scan`."""
    return diagonal_scan(u, log_decay, state, reset, chunk, monoid.associative)
