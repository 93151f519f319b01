"""The selective scan in chunks: only the states at chunk starts are kept for the backward.

With a = exp(delta A) and lam the gradient of the loss to h after a token, the backward is

    lam_t = a_{t+1} lam_{t+1} + dy_t C_t        d(delta A)_t = lam_t a_t h_{t-1}
    d(delta u)_t = sum_n lam_t B_t              dB_t = sum_d lam_t (delta u)_t
    dC_t = sum_d dy_t h_t

from the last token to the first, once each chunk's states have been computed a second time. Every
loop goes token by token: on a CPU one token's state stays in cache. It is laid out (B, N, D), so
that exp and the products run along D. Sums over N or D are matmuls with a vector, because XLA for
CPUs does not vectorise the `sum` (for B = 1 the whole would take eight times as long). On a
CPU decays are powers of two by `exp2` below: a third of the time went to XLA's `exp`.

A document's first token takes nothing from the state before it and passes nothing back, not even a
nan, so that packed documents need no further isolation.
"""

import math

import jax
import jax.numpy as jnp

from .. import keep, tuned
from ..dispatch import target

LOG2_E = math.log2(math.e)
CHUNK = 32  # 16 to 64 take the same time on a CPU
# of 2^r for |r| <= 1/2, the highest power first: a relative error of at most 1.6e-8, as float32
COEFFICIENTS = 1.5345813e-4, 1.3399931e-3, 9.6184891e-3, 5.5503286e-2, 0.24022646, 0.69314718, 1.0
MANTISSA, BIAS = 23, 127  # of float32: bits of the mantissa, the exponent's of 1
INTEGERS = 1.5 * 2.0**MANTISSA  # a whole number more: it stands in the mantissa's lowest bits


def selective_scan(u, delta, A, B, C, D, state, reset, chunk):
    """The recurrence; for gradients it keeps one state a chunk, makes `chunk` more at a time."""
    time = u.shape[1]
    chunk = min(chunk or tuned.size("selective_scan", "xla", CHUNK, **features(u, A)), time)
    tokens = u, delta, B, C, reset
    if padding := -time % chunk:  # delta = 0 is neutral: a = 1 and delta u B = 0

        def pad(x):
            return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))

        tokens = jax.tree.map(pad, tokens)
    y, state = _scan(chunk, tokens, A.T, D, jnp.swapaxes(state, 1, 2))
    return y[:, :time], jnp.swapaxes(state, 1, 2)


def features(u, A):
    """What a measured chunk depends on."""
    return {"N": A.shape[1], "dtype": u.dtype.name}


def exp2(x):
    """2^x of float32, to two units in the last place: 0 up to -127, infinity from 127.5 on; what is
    below -126, where float32 has few bits left, may be 0 as well.

    2^x = 2^n 2^r, n whole: a power of two made from its bits, times a polynomial. On a CPU XLA's
    own takes more than twice as long.
    """
    x = jnp.where(x < -127, -127, x)  # a nan is neither, and stays
    x = jnp.where(x > 128, 128, x)
    n = jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    power, *others = COEFFICIENTS
    for coefficient in others:
        power = power * (x - n) + coefficient
    bits = jax.lax.bitcast_convert_type(n + (INTEGERS + BIAS), jnp.int32) << MANTISSA
    return power * jax.lax.bitcast_convert_type(bits, jnp.float32)


def rates(A, dtype):
    """based, power: power(delta * based) is exp(delta * A), by `exp2` where that is quicker."""
    if target().platform != "cpu" or jnp.result_type(A, dtype) != jnp.float32:
        return A, jnp.exp
    based = A.astype(jnp.float32) * LOG2_E
    return jnp.maximum(based, jnp.finfo(jnp.float32).min), exp2  # times delta = 0 that is 0


def _values(chunk, tokens, A, D, state):
    """u, delta (B, T, D), B, C (B, T, N), reset (B, T) or None; A (N, D), state (B, N, D)."""
    return _forward(chunk, tokens, A, D, state)[0]


def _forward(chunk, tokens, A, D, state):
    based, power = rates(A, state.dtype)

    def token(h, x):
        u, delta, B, C, reset = x
        h = _step(power, based, _kept(reset, h), delta, delta * u, B)
        return h, _over_state(h, C) + D * u

    def body(carry, i):
        h, y = carry
        end, part = jax.lax.scan(token, h, _take(tokens, i, chunk, h.dtype))
        return (end, _put(y, i, part)), h

    u = tokens[0]
    chunks = jnp.arange(u.shape[1] // chunk, dtype=jnp.int32)
    (state, y), starts = jax.lax.scan(body, (state, jnp.zeros_like(u)), chunks)
    return (y, state), (tokens, A, D, starts)


def _backward(chunk, residuals, cotangents):
    tokens, A, D, starts = residuals
    dy, dstate = cotangents
    based, power = rates(A, starts.dtype)

    def again(h, x):
        delta, delta_u, B, dy, reset = x
        before = _kept(reset, h)
        h = _step(power, based, before, delta, delta_u, B)
        return h, (before, _over_width(h, dy))

    def token(carry, x):
        later, dA = carry  # later: a_{t+1} lam_{t+1}
        delta, delta_u, B, C, dy, before, reset = x
        lam = later + _row(dy) * _column(C)
        earlier = power(_row(delta) * based) * lam
        dlog = earlier * before
        parts = (
            _over_state(dlog * A, jnp.ones_like(B)),
            _over_state(lam, B),
            _over_width(lam, delta_u),
        )
        return (_kept(reset, earlier), dA + dlog * _row(delta)), parts

    def body(carry, x):
        later, dA, dD, gradients = carry
        i, start = x
        u, delta, B, C, reset, dy_ = _take((*tokens, dy), i, chunk, start.dtype)
        delta_u = delta * u
        _, (before, dC) = jax.lax.scan(again, start, (delta, delta_u, B, dy_, reset))
        xs = delta, delta_u, B, C, dy_, before, reset
        (later, dA), (dlog, lam_B, dB) = jax.lax.scan(token, (later, dA), xs, reverse=True)
        new = delta * lam_B + D * dy_, dlog + u * lam_B, dB, dC
        gradients = tuple(_put(all_, i, part) for all_, part in zip(gradients, new, strict=True))
        return (later, dA, dD + (dy_ * u).sum((0, 1)), gradients), None

    zeros = jnp.zeros_like(dstate), jnp.zeros_like(D), tuple(map(jnp.zeros_like, tokens[:4]))
    chunks = jnp.arange(starts.shape[0], dtype=jnp.int32)
    carry, _ = jax.lax.scan(body, (dstate, *zeros), (chunks, starts), reverse=True)
    dstate, dA, dD, gradients = carry
    return (*gradients, None), dA.sum(0), dD, dstate


_scan = jax.custom_vjp(_values, nondiff_argnums=(0,))
_scan.defvjp(keep.rule(_forward), _backward)


def _step(power, based, h, delta, delta_u, B):
    return power(_row(delta) * based) * h + _row(delta_u) * _column(B)


def _kept(reset, h):
    """The state, or its gradient, that crosses into a token: nothing where a document begins."""
    return h if reset is None else jnp.where(reset[:, None, None], 0, h)


def _row(x):
    return x[:, None, :]


def _column(x):
    return x[:, :, None]


def _over_state(h, x):
    return jnp.einsum("bnd,bn->bd", h, x, precision="highest")


def _over_width(h, x):
    return jnp.einsum("bnd,bd->bn", h, x, precision="highest")


def _take(tokens, i, chunk, dtype):
    """The i-th chunk, time leading, as `dtype`."""

    def one(x):
        x = jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1), 1, 0)
        return x if x.dtype == bool else x.astype(dtype)

    return jax.tree.map(one, tokens)


def _put(whole, i, part):
    part = jnp.moveaxis(part, 0, 1)
    return jax.lax.dynamic_update_slice_in_dim(
        whole, part.astype(whole.dtype), i * part.shape[1], axis=1
    )
