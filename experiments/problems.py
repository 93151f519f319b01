"""The operations that `benchmark` times: their inputs, and a plain way to compute each.

The plain one is a scan token by token in float32 under automatic differentiation; for `attention`
the whole matrix of scores, for the grouped matmuls `jax.lax.ragged_dot`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..kernels import attention, fixed_query, grouped_matmul, linear_attention, selective_scan


class Problem(NamedTuple):
    """One operation on one set of inputs."""

    ours: Callable
    """Takes `implementation` too."""
    plain: Callable
    arguments: tuple
    flops: int
    """Operations of the forward pass, token by token; a multiply-add is two."""


def token_scan(step: Callable, state: Any, tokens: Any, dtype: DTypeLike) -> tuple[Any, Any]:
    """One `lax.scan` step a token, in float32, with nothing clever in the backward."""

    def one(state, token):
        state, y = step(state, jax.tree.map(lambda x: x.astype(jnp.float32), token))
        return state, y.astype(dtype)

    state, y = jax.lax.scan(one, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1), state


def linear_step(state, token):
    q, k, v, log = token
    decay = jnp.exp(log).reshape(log.shape + (1,) * (state.ndim - log.ndim))
    state = decay * state + k[..., :, None] * v[..., None, :]
    return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")


def retention(heads: int) -> jax.Array:
    """RetNet's log decay of each head (arXiv:2307.08621); it has no gradient."""
    return jnp.log1p(-(2.0 ** -(5 + jnp.arange(heads, dtype=jnp.float32))))


def linear(q, k, v, log_decay, state, implementation=None):
    return linear_attention(q, k, v, log_decay, state=state, implementation=implementation)


def linear_plain(q, k, v, log_decay, state):
    return token_scan(linear_step, state, (q, k, v, log_decay), q.dtype)


def selective_plain(u, delta, A, B, C):
    def step(h, token):
        u, delta, B, C = token
        h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, C, precision="highest")

    return token_scan(step, jnp.zeros((len(u), *A.shape), jnp.float32), (u, delta, B, C), u.dtype)


def aaren_plain(query, k, v):
    query = query.astype(jnp.float32)

    def step(state, token):
        (m, n, w), (k, v) = state, token
        score = jnp.einsum("hk,bhk->bh", query, k, precision="highest") * query.shape[1] ** -0.5
        top = jnp.maximum(m, score)
        old, new = jnp.exp(m - top), jnp.exp(score - top)
        n, w = old * n + new, old[..., None] * w + new[..., None] * v
        return (top, n, w), w / n[..., None]

    zero = jnp.zeros((len(k), len(query)), jnp.float32)
    state = zero - 1e30, zero, jnp.zeros(v[:, 0].shape, jnp.float32)
    return token_scan(step, state, (k, v), v.dtype)


def attention_plain(q, k, v):
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    scores = product("bthk,bshk->bhts", q, k) * q.shape[3] ** -0.5
    seen = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return product("bhts,bshv->bthv", weights.astype(v.dtype), v).astype(v.dtype)


def grouped_plain(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes, precision="highest")


def problems(
    batch: int, length: int, heads: int, width: int, dtype: DTypeLike
) -> dict[str, Callable[[], Problem]]:
    """By name, what makes an operation's inputs: `heads` heads of `width` features.

    The selective scan has 2 heads x width channels of 16 states; the grouped matmuls take rows of
    heads x width features to twice as many. Decays, states and steps are float32 whatever `dtype`.
    """
    rng, model = np.random.default_rng(0), heads * width

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def tokens(count):
        return [normal(batch, length, heads, width) for _ in range(count)]

    def mixed(kind):
        *qkv, state = *tokens(3), normal(batch, heads, width, width, dtype=jnp.float32)
        flops = 2 * 2 * batch * length * heads * width**2
        if kind == "constant":
            log = retention(heads)

            def ours(q, k, v, state, implementation=None):
                return linear(q, k, v, log, state, implementation)

            def plain(q, k, v, state):
                every = jnp.broadcast_to(log, (batch, length, heads))
                return linear_plain(q, k, v, every, state)

            return Problem(ours, plain, (*qkv, state), flops)
        shape = (batch, length, heads, width) if kind == "vector" else (batch, length, heads)
        log = jax.nn.log_sigmoid(normal(*shape, dtype=jnp.float32))
        return Problem(linear, linear_plain, (*qkv, log, state), flops)

    def selective(states=16):
        channels = 2 * model
        u, B, C = (normal(batch, length, n) for n in (channels, states, states))
        delta = jax.nn.softplus(normal(batch, length, channels, dtype=jnp.float32) - 4)
        A = -jnp.broadcast_to(jnp.arange(1.0, states + 1, dtype=jnp.float32), (channels, states))
        flops = 2 * 3 * batch * length * channels * states
        return Problem(selective_scan, selective_plain, (u, delta, A, B, C), flops)

    def aaren():
        arguments = normal(heads, width), *tokens(2)
        return Problem(fixed_query, aaren_plain, arguments, 2 * 2 * batch * length * model)

    def softmax():
        flops = 2 * batch * length**2 * model  # two products, of the half that is seen
        return Problem(attention, attention_plain, (*tokens(3),), flops)

    def grouped(experts):
        rows, hidden = batch * length, 2 * model
        sizes = rng.multinomial(rows, np.full(experts, 1 / experts))
        x, w = normal(rows, model), normal(experts, model, hidden)
        arguments = x, w, jnp.asarray(sizes, jnp.int32)
        return Problem(grouped_matmul, grouped_plain, arguments, 2 * rows * model * hidden)

    return {
        "gla": lambda: mixed("vector"),
        "mamba2": lambda: mixed("scalar"),
        "retention": lambda: mixed("constant"),
        "mamba": selective,
        "aaren": aaren,
        "attention": softmax,
        "grouped-8": lambda: grouped(8),
        "grouped-64": lambda: grouped(64),
    }
