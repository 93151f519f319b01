"""The selective scan for TPUs: a grid step a chunk of tokens of a block of channels.

The decay is another for each channel and state, so no product of matrices computes it: tokens go
one after another, the state (N, D block) in vector registers with channels in lanes. The equations
are those of `xla.py`. A token's B and C are columns of (N, C) tiles, its u and delta rows of tiles.

Bytes move only for u, delta and y (backward: u, delta, dy and their two gradients) once each; B and
C are read once a block of channels, a state of N numbers a channel is kept once a chunk, and only
where a gradient is asked for. That is little beside the arithmetic: an exponential and 6 other
operations a token, channel and state forward, two and 17 backward. By the compiler's schedule for
v5e, a token of 512 channels with 16 states takes 31 cycles forward and 84 backward. They need up to
3 and 9 MiB of VMEM.

A document's first token takes nothing from the state before it and passes nothing back, not even a
nan. What is padded, tokens, channels or states, has delta, A, B and C zero, which changes nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import keep, pallas, tuned
from ..pallas import index, over_chunks, shape
from .xla import features

CHUNK = 128
STATES = 1 << 20  # numbers in the states of a chunk, which the backward computes again: 4 MiB
STATE = 16 << 10  # numbers in one state: 16 of the 64 registers
LANES = 128


def refuse(u, delta, A, B, C, D, state, reset, chunk):
    """Why not, or None."""
    del D, state, reset
    if reason := pallas.no_tpu(u, delta, B, C):
        return reason
    tile = _tile(u, delta)
    if chunk is not None and chunk % tile:
        return f"its chunks are multiples of {tile} tokens for {u.dtype}, not {chunk}"
    most = STATES // (LANES * _up(A.shape[1], 8))
    if (chunk or tile) > most:
        return f"its chunks of N={A.shape[1]} states are up to {most // tile * tile} tokens long"
    return None


def selective_scan(u, delta, A, B, C, D, state, reset, chunk):
    """The public function's arguments after its checks."""
    (batch, time, width), N = u.shape, A.shape[1]
    tile, states, channels = _tile(u, delta), _up(N, 8), _up(width, LANES)
    named = chunk or tuned.size("selective_scan", "pallas_tpu", CHUNK, **features(u, A))
    least = tile if named == CHUNK and chunk is None else _up(named, tile)
    block = LANES
    for wider in (2 * LANES, 4 * LANES):
        fits = wider * states <= STATE and wider * states * least <= STATES
        block = wider if fits and channels % wider == 0 else block
    most = STATES // (block * states) // tile * tile
    size = min(_up(named, tile), most, _up(time, tile))

    def pad(x, *to):
        return jnp.pad(x, [(0, n - have) for n, have in zip(to, x.shape, strict=True)])

    tokens = _up(time, size)
    u, delta = (pad(x, batch, tokens, channels) for x in (u, delta))
    B, C = (pad(x, batch, tokens, states) for x in (B, C))
    B, C = (rearrange(x, "b (m c) n -> b m n c", c=size) for x in (B, C))
    if reset is not None:
        reset = pad(reset.astype(jnp.int32), batch, tokens)
        reset = rearrange(reset, "b (m c) -> b m 1 c", c=size)
    y, state = _scan(
        pallas.target(),
        (size, tile, block),
        u,
        delta,
        pad(A.T, states, channels),
        B,
        C,
        pad(D[None], 1, channels),
        pad(jnp.swapaxes(state, 1, 2), batch, states, channels),
        reset,
    )
    return y[:, :time, :width], jnp.swapaxes(state[:, :N, :width], 1, 2)


def _up(n, multiple):
    return n + -n % multiple


def _tile(u, delta):
    """Tokens that are loaded at once: the rows of a tile of the narrower dtype."""
    return 32 // min(u.dtype.itemsize, delta.dtype.itemsize)


def column(x, t):
    """Token t of (N, C) as (N, 1)."""
    here = index(x.shape, 1) == t
    return jnp.sum(jnp.where(here, x, 0), axis=1, keepdims=True)


def with_column(x, t, new):
    """(N, C) with token t's column (N, 1)."""
    return jnp.where(index(x.shape, 1) == t, new, x)


def with_row(x, j, new):
    """(tile, D) with row j (1, D)."""
    return jnp.where(index(x.shape, 0) == j, new, x)


def rows(ref, start, tile):
    """(tile, D) of a chunk's tokens, in float32."""
    from jax.experimental import pallas as pl

    return ref[pl.ds(start, tile), :].astype(jnp.float32)


def kept(begins, t, h):
    """The state, or its gradient, that crosses into token t."""
    return h if begins is None else jnp.where(begins[0, t] != 0, 0, h)


def _forward_kernel(tile, packed, keep, u, delta, A, B, C, D, state, *refs):
    from jax.experimental import pallas as pl

    begins = refs[0] if packed else None
    y, h, *starts = refs[packed:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        h[...] = state[...]

    if keep:
        starts[0][...] = h[...]
    A, B, C = A[...], B[...].astype(jnp.float32), C[...].astype(jnp.float32)

    def group(g, h):
        start = pl.multiple_of(g * tile, tile)
        u_, delta_ = rows(u, start, tile), rows(delta, start, tile)
        given, out = delta_ * u_, jnp.zeros_like(u_)
        for j in range(tile):
            t, one = start + j, slice(j, j + 1)
            h = jnp.exp(delta_[one] * A) * kept(begins, t, h) + given[one] * column(B, t)
            out = with_row(out, j, jnp.sum(h * column(C, t), axis=0, keepdims=True))
        y[pl.ds(start, tile), :] = (out + D[...] * u_).astype(y.dtype)
        return h

    h[...] = jax.lax.fori_loop(0, u.shape[0] // tile, group, h[...])


def _backward_kernel(tile, packed, u, delta, A, B, C, D, begin, dy, d_final, *refs):
    from jax.experimental import pallas as pl

    begins = refs[0] if packed else None
    du, d_delta, dA, dB, dC, dD, d_state, before = refs[packed:]
    groups = u.shape[0] // tile

    @pl.when(pl.program_id(2) == 0)
    def _():
        dA[...], dD[...], d_state[...] = jnp.zeros_like(dA), jnp.zeros_like(dD), d_final[...]

    A, B, C = A[...], B[...].astype(jnp.float32), C[...].astype(jnp.float32)

    def again(g, carry):
        h, dC = carry
        start = pl.multiple_of(g * tile, tile)
        u_, delta_, dy_ = (rows(x, start, tile) for x in (u, delta, dy))
        given = delta_ * u_
        for j in range(tile):
            t, one = start + j, slice(j, j + 1)
            h = kept(begins, t, h)
            before[t] = h
            h = jnp.exp(delta_[one] * A) * h + given[one] * column(B, t)
            dC = with_column(dC, t, jnp.sum(h * dy_[one], axis=1, keepdims=True))
        return h, dC

    _, dC[...] = jax.lax.fori_loop(0, groups, again, (begin[...], jnp.zeros_like(C)))

    def back(i, carry):
        later, dA, dB = carry  # later: a_{t+1} lam_{t+1}
        start = pl.multiple_of((groups - 1 - i) * tile, tile)
        u_, delta_, dy_ = (rows(x, start, tile) for x in (u, delta, dy))
        given, of_log, lam_B = delta_ * u_, jnp.zeros_like(u_), jnp.zeros_like(u_)
        for j in reversed(range(tile)):
            t, one = start + j, slice(j, j + 1)
            lam = later + dy_[one] * column(C, t)
            earlier = jnp.exp(delta_[one] * A) * lam
            d_log = earlier * before[t]
            dA += d_log * delta_[one]
            dB = with_column(dB, t, jnp.sum(lam * given[one], axis=1, keepdims=True))
            of_log = with_row(of_log, j, jnp.sum(d_log * A, axis=0, keepdims=True))
            lam_B = with_row(lam_B, j, jnp.sum(lam * column(B, t), axis=0, keepdims=True))
            later = kept(begins, t, earlier)
        here = pl.ds(start, tile)
        du[here, :] = (delta_ * lam_B + D[...] * dy_).astype(du.dtype)
        d_delta[here, :] = (of_log + u_ * lam_B).astype(d_delta.dtype)
        dD[...] += jnp.sum(dy_ * u_, axis=0, keepdims=True)
        return later, dA, dB

    carry = d_state[...], dA[...], jnp.zeros_like(B)
    d_state[...], dA[...], dB[...] = jax.lax.fori_loop(0, groups, back, carry)


class Blocks:
    """Which part of an array a grid step (row, block of channels, n-th chunk) works on."""

    def __init__(self, size, block, chunks, reverse=False):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def spec(part, place, **how):
            def at(b, d, n):
                return place(b, d, jnp.int32(chunks - 1) - n if reverse else n)

            return lambda x: pl.BlockSpec(part(x), at, **how)

        def whole(x):
            return (None, None, *x.shape[2:])

        self.tokens = spec(lambda x: (None, size, block), lambda b, d, n: (b, n, d))
        self.columns = spec(whole, lambda b, d, n: (b, n, 0, 0))
        self.begins = spec(whole, lambda b, d, n: (b, n, 0, 0), memory_space=pltpu.SMEM)
        self.shared = spec(lambda x: (x.shape[0], block), lambda b, d, n: (0, d))
        self.state = spec(lambda x: (None, x.shape[1], block), lambda b, d, n: (b, 0, d))
        self.states = spec(lambda x: (None, None, x.shape[2], block), lambda b, d, n: (b, n, 0, d))
        self.parts = spec(lambda x: (None,) * 3 + x.shape[3:], lambda b, d, n: (b, d, n, 0, 0))


def _forward(device, plan, u, delta, A, B, C, D, state, reset, keep=True):
    size, tile, block = plan
    batch, chunks = B.shape[:2]
    at, packed = Blocks(size, block, chunks), reset is not None
    inputs = [(at.tokens, u), (at.tokens, delta), (at.shared, A), (at.columns, B), (at.columns, C)]
    inputs += [(at.shared, D), (at.state, state), *([(at.begins, reset)] if packed else [])]
    outputs = [(at.tokens, shape(*u.shape, dtype=u.dtype)), (at.state, shape(*state.shape))]
    outputs += [(at.states, shape(batch, chunks, *A.shape))] if keep else []
    kernel = partial(_forward_kernel, tile, packed, keep)
    grid = batch, u.shape[2] // block, chunks
    y, final, *starts = over_chunks(device, kernel, grid, inputs, outputs, ())
    return (y, final), (u, delta, A, B, C, D, reset, *starts)


def _backward(device, plan, residuals, cotangents):
    u, delta, A, B, C, D, reset, starts = residuals
    dy, d_final = cotangents
    size, tile, block = plan
    batch, chunks = B.shape[:2]
    grid = batch, u.shape[2] // block, chunks
    at, packed = Blocks(size, block, chunks, reverse=True), reset is not None
    inputs = [(at.tokens, u), (at.tokens, delta), (at.shared, A), (at.columns, B), (at.columns, C)]
    inputs += [(at.shared, D), (at.states, starts), (at.tokens, dy), (at.state, d_final)]
    inputs += [(at.begins, reset)] if packed else []
    part = shape(*grid, *B.shape[2:])
    outputs = [
        (at.tokens, shape(*u.shape, dtype=u.dtype)),
        (at.tokens, shape(*delta.shape, dtype=delta.dtype)),
        (at.state, shape(batch, *A.shape)),
        (at.parts, part),
        (at.parts, part),
        (at.state, shape(batch, *D.shape)),
        (at.state, shape(*d_final.shape)),
    ]
    kernel = partial(_backward_kernel, tile, packed)
    scratch = [(size, A.shape[0], block)]
    grads = over_chunks(device, kernel, grid, inputs, outputs, scratch)
    du, d_delta, dA, dB, dC, dD, d_state = grads
    dB, dC = (d.sum(axis=1).astype(x.dtype) for d, x in ((dB, B), (dC, C)))
    return du, d_delta, dA.sum(axis=0), dB, dC, dD.sum(axis=0), d_state, None


def _values(device, plan, u, delta, A, B, C, D, state, reset):
    """u, delta (B, T, D); A (N, D); B, C (B, T / C, N, C); D (1, D); state (B, N, D)."""
    return _forward(device, plan, u, delta, A, B, C, D, state, reset, keep=False)[0]


_scan = jax.custom_vjp(_values, nondiff_argnums=(0, 1))
_scan.defvjp(keep.rule(_forward), _backward)
