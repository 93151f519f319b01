"""The fixed-query softmax scan for TPUs: a grid step a chunk, the softmax state in VMEM.

XLA makes the scores, one number a token and head, and takes their gradient back to q and k; the
kernel reads them and the values and writes the outputs. The equations and the cotangents that pass
from chunk to chunk are those of `fixed_query_xla.py`; the pairs of a chunk are one tile.

Bytes a token and head of V values in bfloat16: forward 4 V and 4 of a score, the least there is,
and 4 V / C of states where a gradient is asked for; backward 4 V read, 4 V of gradients in float32
and 8 of scores, against 6 V. XLA puts the heads before time, which moves all once more. Operations:
2 C V forward, 6 C V backward, of which half is of use.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import dispatch, keep, pallas, tuned
from ..monoid import LOWEST
from ..pallas import column, index
from ..pallas import dot as product
from . import tiles

CHUNK, LEAST, MOST = 128, 8, 512


def refuse(q, k, v, *rest):
    """Why not, or None."""
    *_, chunk = rest
    if reason := pallas.no_tpu(q, k, v):
        return reason
    return None if chunk is None else _refuse(chunk)


def _refuse(chunk):
    if chunk % LEAST or chunk > MOST:
        return f"its chunks are multiples of {LEAST} up to {MOST}, not {chunk}"
    return None


def fixed_query(q, k, v, scale, state, reset, chunk):
    """The public function's arguments after its checks."""
    (time, groups), dtype = k.shape[1:3], jnp.result_type(q, k, v)
    about = tiles.features(k, v)
    chunk = chunk or tuned.size("fixed_query", "pallas_tpu", CHUNK, _refuse, **about)
    size = min(chunk, -(-time // LEAST) * LEAST)
    padding = -time % size

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    by_group = rearrange(q.astype(jnp.float32), "(g r) k -> g r k", g=groups)
    k, v = pad(k.astype(jnp.float32)), pad(v.astype(dtype))
    s = scale * jnp.einsum("grk,btgk->bgrt", by_group, k, precision="highest")
    s = rearrange(s, "b g r (n c) -> b (g r) n 1 c", c=size)
    segment = None
    if reset is not None:
        begins = rearrange(pad(reset), "b (n c) -> b 1 n 1 c", c=size)
        segment = jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
    m, u, w = state
    state = m[..., None, None], u[..., None, None], w[:, :, None]
    how = dispatch.target(), size, time
    y, (m, u, w) = _scan(how, s, rearrange(v, "b t g v -> b g t v"), state, segment)
    y = rearrange(y, "b h t v -> b t h v")[:, :time].astype(dtype)
    return y, (m[..., 0, 0], u[..., 0, 0], w[:, :, 0])


class Chunk:
    """The pairs of a chunk: weights p (C, C) and, a row a token, the states after each."""

    def __init__(self, real, s, v, segment, state):
        m, u, w = (x[...] for x in state)
        size = s.shape[1]
        self.exact = v.dtype == jnp.float32
        self.v, self.s = v.astype(jnp.float32), s
        i, j = index((size, size), 0), index((size, size), 1)
        see = (j <= i) & (j < real)
        keep = jnp.full((size, 1), True)
        if segment is not None:
            begins = segment.astype(jnp.float32)
            own = column(begins)
            see &= own == begins
            keep = own == 0
        s = jnp.where(see, s, LOWEST)
        self.m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), jnp.where(keep, m, LOWEST))
        self.p = pallas.rounded(jnp.where(see, jnp.exp(s - self.m), 0), self.exact)
        self.fade = jnp.where(keep, jnp.exp(m - self.m), 0)
        self.u = jnp.sum(self.p, axis=1, keepdims=True) + self.fade * u
        self.w = product(self.p, self.v, "ts,sv->tv", self.exact) + self.fade * w
        self.scores = s


def mean(u, w):
    """w / u, and 0 of a state of nothing: (..., 1) and (..., V)."""
    return jnp.where(u == 0, 0, w / u)


def _real(size, time, chunk):
    """How many tokens of a chunk there are."""
    return jnp.minimum(time - chunk * size, size)


def _forward_kernel(size, time, packed, keep, s, v, m, u, w, *refs):
    from jax.experimental import pallas as pl

    segment, n = (refs[0][...] if packed else None), pl.program_id(2)
    y, *refs = refs[packed:]
    final, kept, state = refs[:3], refs[3:-3], refs[-3:]

    @pl.when(n == 0)
    def _():
        for mine, given in zip(state, (m, u, w), strict=True):
            mine[...] = given[...]

    for out, mine in zip(kept, state, strict=keep):
        out[...] = mine[...]
    c = Chunk(_real(size, time, n), s[...], v[...], segment, state)
    y[...] = (c.w / c.u).astype(y.dtype)
    for mine, after in zip(state, (c.m, c.u, c.w), strict=True):
        mine[...] = after[-1:]

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        for out, mine in zip(final, state, strict=True):
            out[...] = mine[...]


def _backward_kernel(size, time, packed, s, v, m, u, w, dy, *refs):
    from jax.experimental import pallas as pl

    given, refs = refs[:3], refs[3:]
    segment, n = (refs[0][...] if packed else None), pl.program_id(2)
    ds, dv, *refs = refs[packed:]
    out, carry = refs[:3], refs[3:]

    @pl.when(n == 0)
    def _():
        for mine, x in zip(carry, given, strict=True):
            mine[...] = x[...]

    dtop, dmass, dw = (x[...] for x in carry)
    c = Chunk(_real(size, time, pl.num_programs(2) - 1 - n), s[...], v[...], segment, (m, u, w))
    y = c.w / c.u
    end = index((size, 1), 0) == size - 1
    dw_t = dy[...].astype(jnp.float32) / c.u + jnp.where(end, dw, 0)
    dmass_t = jnp.where(end, dmass, 0)
    own = dmass_t - jnp.sum(dw_t * y, axis=1, keepdims=True)
    gradient = c.p * (product(dw_t, c.v, "tv,sv->ts", c.exact) + own)
    dv[...] = product(c.p, dw_t, "ts,tv->sv", c.exact)

    came = (c.fade[-1:] > 0) & (m[...] == c.m[-1:])
    largest = c.scores[-1:] == c.m[-1:]
    i, j = index((size, size), 0), index((size, size), 1)
    count = jnp.where(i <= j, column(jnp.where(largest, 1.0, 0.0)), 0)
    count = jnp.sum(count, axis=0, keepdims=True)
    total = count[:, -1:]
    earlier = jnp.where((count > 1) | came, 1.0, 0.0)
    shares = jnp.where(largest, dtop * jnp.exp2(count - total - earlier), 0)
    ds[...] = jnp.sum(gradient, axis=0, keepdims=True) + shares

    before = mean(u[...], w[...])
    passed = dmass_t + jnp.sum(dw_t * (before - y), axis=1, keepdims=True)
    carry[0][...] = jnp.where(came, dtop * jnp.exp2(-total), 0)
    carry[1][...] = jnp.sum(c.fade * passed, axis=0, keepdims=True)
    carry[2][...] = jnp.sum(c.fade * dw_t, axis=0, keepdims=True)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        for x, mine in zip(out, carry, strict=True):
            x[...] = mine[...]


def _forward(how, s, v, state, segment, keep=True):
    device, size, time = how
    grid, packed = s.shape[:3], segment is not None
    at = pallas.Blocks(size, grid)
    inputs = [(at, s), (at, v), *((at.state, x) for x in state)]
    inputs += [(at, segment)] if packed else []
    outputs = [
        (at, pallas.shape(*grid[:2], *v.shape[2:], dtype=v.dtype)),
        *((at.state, pallas.shape(*x.shape)) for x in state),
        *((at, pallas.shape(*grid, *x.shape[2:])) for x in state if keep),
    ]
    kernel = partial(_forward_kernel, size, time, packed, keep)
    scratch = [x.shape[2:] for x in state]
    y, *states = pallas.over_chunks(device, kernel, grid, inputs, outputs, scratch)
    return (y, tuple(states[:3])), (s, v, segment, states[3:], states[:3], state)


def _backward(how, residuals, cotangents):
    s, v, segment, starts, final, state = residuals
    dy, (dm, du, dw) = cotangents
    device, size, time = how
    grid, packed = s.shape[:3], segment is not None
    # Between chunks du goes as dmass and dm as dtop, as in fixed_query_xla.py.
    dmass = du + (dw * mean(*final[1:])).sum(-1, keepdims=True)
    carry = dm - final[1] * dmass, dmass, dw
    at = pallas.Blocks(size, grid, reverse=True)
    inputs = [*((at, x) for x in (s, v, *starts, dy)), *((at.state, x) for x in carry)]
    inputs += [(at, segment)] if packed else []
    outputs = [
        (at, pallas.shape(*s.shape)),
        (at, pallas.shape(*grid[:2], *v.shape[2:])),
        *((at.state, pallas.shape(*x.shape)) for x in carry),
    ]
    kernel, scratch = partial(_backward_kernel, size, time, packed), [x.shape[2:] for x in carry]
    ds, dv, *carry = pallas.over_chunks(device, kernel, grid, inputs, outputs, scratch)
    dtop, dmass, dw = carry
    du = dmass - (dw * mean(*state[1:])).sum(-1, keepdims=True)
    return (
        ds,
        pallas.collect(dv, v.shape[:2]).astype(v.dtype),
        (dtop + state[1] * dmass, du, dw),
        None,
    )


def _values(how, s, v, state, segment):
    return _forward(how, s, v, state, segment, keep=False)[0]


_scan = jax.custom_vjp(_values, nondiff_argnums=(0,))
_scan.defvjp(keep.rule(_forward), _backward)
