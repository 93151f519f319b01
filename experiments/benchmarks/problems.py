"""The operations that `benchmark` times: their inputs, and a plain way to compute each.

The plain one is a scan token by token in float32 under automatic differentiation; for `attention`
the whole matrix of scores, for the grouped matmuls `jax.lax.ragged_dot`.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ...kernels import (
    attention,
    diagonal_scan,
    fixed_query,
    grouped_matmul,
    linear_attention,
    selective_scan,
)
from ...models import LMConfig
from ...models.pattern import parse


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


def convs5_plain(u_re, u_im, log_re, log_im):
    decay = jnp.exp(log_re) * jnp.cos(log_im), jnp.exp(log_re) * jnp.sin(log_im)

    def step(state, token):
        (re, im), (u_re, u_im) = state, token
        re, im = decay[0] * re - decay[1] * im + u_re, decay[0] * im + decay[1] * re + u_im
        return (re, im), jnp.stack([re, im], axis=1)

    zero = jnp.zeros(u_re[:, 0].shape, jnp.float32)
    x, state = token_scan(step, (zero, zero), (u_re, u_im), u_re.dtype)
    return (x[:, :, 0], x[:, :, 1]), state


def convs5(u_re, u_im, log_re, log_im, implementation=None):
    return diagonal_scan((u_re, u_im), (log_re, log_im), implementation=implementation)


def grouped_plain(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes, precision="highest")


def linear_problem(
    decay: str,
    shape: tuple[int, int, int],
    keys: int,
    values: int,
    dtype: DTypeLike,
    groups: int | None = None,
) -> Problem:
    """Linear attention of (rows, tokens, heads): decay `vector`, `scalar` or `constant`.

    Of queries and keys there are `groups` heads (all); the plain one takes no fewer.
    """
    normal, (batch, length, heads) = draws(dtype), shape
    q, k = (normal(batch, length, groups or heads, keys) for _ in range(2))
    v = normal(*shape, values)
    state = normal(batch, heads, keys, values, dtype=jnp.float32)
    flops = 2 * 2 * batch * length * heads * keys * values
    if decay == "constant":
        log = retention(heads)

        def ours(q, k, v, state, implementation=None):
            return linear(q, k, v, log, state, implementation)

        def plain(q, k, v, state):
            return linear_plain(q, k, v, jnp.broadcast_to(log, shape), state)

        return Problem(ours, plain, (q, k, v, state), flops)
    each = (*shape, keys) if decay == "vector" else shape
    log = jax.nn.log_sigmoid(normal(*each, dtype=jnp.float32))
    return Problem(linear, linear_plain, (q, k, v, log, state), flops)


def selective_problem(
    batch: int, length: int, channels: int, states: int, dtype: DTypeLike
) -> Problem:
    normal = draws(dtype)
    u, B, C = (normal(batch, length, n) for n in (channels, states, states))
    delta = jax.nn.softplus(normal(batch, length, channels, dtype=jnp.float32) - 4)
    A = -jnp.broadcast_to(jnp.arange(1.0, states + 1, dtype=jnp.float32), (channels, states))
    flops = 2 * 3 * batch * length * channels * states
    return Problem(selective_scan, selective_plain, (u, delta, A, B, C), flops)


def aaren_problem(shape: tuple[int, int, int], width: int, dtype: DTypeLike) -> Problem:
    """Aaren of (rows, tokens, heads)."""
    normal = draws(dtype)
    arguments = normal(shape[2], width), normal(*shape, width), normal(*shape, width)
    return Problem(fixed_query, aaren_plain, arguments, 2 * 2 * math.prod(shape) * width)


def attention_problem(
    shape: tuple[int, int, int], groups: int, width: int, dtype: DTypeLike
) -> Problem:
    """Softmax attention of (rows, tokens, heads); `groups` heads of keys and values."""
    normal, (batch, length, heads) = draws(dtype), shape
    q, k, v = (normal(batch, length, n, width) for n in (heads, groups, groups))
    flops = 2 * batch * length**2 * heads * width  # two products, of the half that is seen
    return Problem(attention, attention_plain, (q, k, v), flops)


def convs5_problem(
    batch: int, length: int, pixels: int, channels: int, dtype: DTypeLike
) -> Problem:
    """ConvS5's recurrence over images of so many pixels."""
    normal = draws(dtype)
    u = [normal(batch, length, pixels, channels) for _ in range(2)]
    spread = jnp.linspace(0, 1, channels, dtype=jnp.float32)
    arguments = *u, -0.1 * spread - 1e-3, 3 * spread
    return Problem(convs5, convs5_plain, arguments, 8 * batch * length * pixels * channels)


def grouped_problem(rows: int, experts: int, width: int, hidden: int, dtype: DTypeLike) -> Problem:
    normal = draws(dtype)
    sizes = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts))
    x, w = normal(rows, width), normal(experts, width, hidden)
    arguments = x, w, jnp.asarray(sizes, jnp.int32)
    return Problem(grouped_matmul, grouped_plain, arguments, 2 * rows * width * hidden)


def draws(dtype: DTypeLike) -> Callable[..., jax.Array]:
    """Of a shape normal numbers, in `dtype` if no other is named; the same in every call."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: DTypeLike = dtype) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return normal


def problems(
    batch: int, length: int, heads: int, width: int, dtype: DTypeLike
) -> dict[str, Callable[[], Problem]]:
    """By name, what makes an operation's inputs: `heads` heads of `width` features.

    The selective scan has 2 heads x width channels of 16 states; ConvS5's recurrence images of
    `width` pixels of 4 x heads channels; the grouped matmuls take rows of
    heads x width features to twice as many. Decays, states and steps are float32 whatever `dtype`.
    """
    shape, model = (batch, length, heads), heads * width
    mixed = functools.partial(linear_problem, shape=shape, keys=width, values=width, dtype=dtype)
    grouped = functools.partial(
        grouped_problem, batch * length, width=model, hidden=2 * model, dtype=dtype
    )
    return {
        "gla": lambda: mixed("vector"),
        "mamba2": lambda: mixed("scalar"),
        "retention": lambda: mixed("constant"),
        "mamba": lambda: selective_problem(batch, length, 2 * model, 16, dtype),
        "aaren": lambda: aaren_problem(shape, width, dtype),
        "convs5": lambda: convs5_problem(batch, length, width, 4 * heads, dtype),
        "attention": lambda: attention_problem(shape, heads, width, dtype),
        "grouped-8": lambda: grouped(8),
        "grouped-64": lambda: grouped(64),
    }


def of_model(config: LMConfig, batch: int, length: int) -> list[tuple[Problem, int]]:
    """A model's mixers' operations, in its compute type, and how many blocks have each."""
    mixers = collections.Counter(block.mixer for block in parse(config.pattern, config.depth))
    return [(of_mixer(mixer, config, batch, length), n) for mixer, n in mixers.items()]


def of_mixer(mixer: str, config: LMConfig, batch: int, length: int) -> Problem:
    own, width, dtype = getattr(config, mixer), config.width, jnp.dtype(config.dtype)
    if mixer == "mamba":
        return selective_problem(batch, length, round(own.expand * width), own.state, dtype)
    if mixer == "mamba2":
        shape = batch, length, round(own.expand * width) // own.head_width
        return linear_problem("scalar", shape, own.state, own.head_width, dtype, own.groups)
    shape = batch, length, own.heads
    if mixer in ("gla", "retention"):
        sizes = (round(width * r) // own.heads for r in (own.key_ratio, own.value_ratio))
        return linear_problem("vector" if mixer == "gla" else "constant", shape, *sizes, dtype)
    size = getattr(own, "head_width", None) or width // own.heads
    if mixer == "lightning":
        return linear_problem("constant", shape, size, size, dtype)
    if mixer == "attention":
        return attention_problem(shape, own.kv_heads or own.heads, size, dtype)
    if mixer == "aaren":
        return aaren_problem(shape, size, dtype)
    raise ValueError(f"{mixer}: nothing is known of its operation")
