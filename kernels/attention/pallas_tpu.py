"""FlashAttention-2 for TPUs: tiles of scores in VMEM, an online softmax, a backward in two passes.

A grid step is one tile of queries of one head against one tile of keys; the last axis of the grid
walks the tiles that the masks let through, whose range XLA computes beforehand (`span`): steps past
the range's end load nothing and compute nothing. Arrays are (B, heads, T, features), numbers of a
token (B, heads, tiles, 1, tokens of a tile).

Non-finite numbers are kept as in `xla.py`: a tile's row that holds one is read as nan where the
product's result is masked, and as zeros where the product sums over the masked axis.

Operations for a query and a key: 2 K + 2 V forward, the least there is; 8 K + 6 V backward, where
scores and the weights' gradients are computed in both passes, against 6 K + 4 V. Bytes: q, dy and
what is written move once, and in the backward q and dy once more for each tile of 512 keys; keys
and values once for each 512 queries of each head: at K = V = 128 in bfloat16 a forward tile does
512 operations a byte, a v5e's balance being 240. XLA puts the heads before time, a copy of all.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from .. import dispatch, keep, pallas, tuned
from ..monoid import LOWEST
from ..pallas import dot
from . import decode_pallas_tpu, tiles, xla
from .pallas_tpu_tiles import Keys, Queries, seen

BLOCK = 512
TILES = 65_536  # of either side: 8 bytes each, of a scalar memory of a megabyte


def refuse(q, k, v, first, last, kv_index, scale, block, dtype):
    """Why not, or None."""
    del first, last, kv_index, scale
    if reason := pallas.no_tpu(q, k, v):
        return reason
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it writes float32 or bfloat16, not {dtype}"
    if q.shape[1] == 1:
        return decode_pallas_tpu.refuse(q, k, v, block)
    return _refuse(q, k, block)


def refuse_gradients(q, k, v, dy, lse, delta, first, last, kv_index, scale, block):
    """Why not, or None."""
    del dy, lse, delta, first, last, kv_index, scale
    return pallas.no_tpu(q, k, v) or _refuse(q, k, block)


def _refuse(q, k, block):
    if block is not None and (block % 16 or block > BLOCK):
        return f"its tiles are multiples of 16 tokens up to {BLOCK}, not {block}"
    tiles = q.shape[0] * -(-max(q.shape[1], k.shape[1]) // (block or BLOCK))
    if tiles > TILES:
        return f"it takes up to {TILES} tiles of all rows, not {tiles}"
    return None


def _measured(q, k, v):
    about = tiles.features(q, v)
    return tuned.size("attention", "pallas_tpu", BLOCK, partial(_refuse, q, k), **about)


def attention(q, k, v, first, last, kv_index, scale, block, dtype):
    """Key s is seen by query t iff first_t <= kv_index_s <= last_t. Saves y and lse, O(T)."""
    if q.shape[1] > 1:
        block = block or _measured(q, k, v)
    how = dispatch.target(), scale, block, jnp.dtype(dtype)
    return _attention(how, q, k, v, first, last, kv_index)


def gradients(q, k, v, dy, lse, delta, first, last, kv_index, scale, block):
    """What these keys contribute to the gradients to q, k and v; see `attention_gradients`."""
    block = block or _measured(q, k, v)
    how = dispatch.target(), scale, block, jnp.dtype(jnp.float32)
    return _gradients(how, q, k, v, dy, lse, delta, first, last, kv_index)


def _forward_kernel(scale, exact, low, high, q, k, v, first, last, kv_index, y, lse, m, u, w):
    from jax.experimental import pallas as pl

    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full_like(m, LOWEST)
        u[...] = jnp.zeros_like(u)
        w[...] = jnp.zeros_like(w)

    mine = b * pl.num_programs(2) + i

    @pl.when(j < high[mine] - low[mine])
    def _():
        keys = Keys(k, v, kv_index)
        see = seen(first, last, keys.index)
        s = jnp.where(see, scale * dot(q[...], keys.as_nan, "tk,sk->ts", exact), LOWEST)
        top = jnp.maximum(m[...], jnp.max(s, axis=1, keepdims=True))
        p = pallas.rounded(jnp.where(see, jnp.exp(s - top), 0), exact)
        fade = jnp.exp(m[...] - top)
        m[...] = top
        u[...] = fade * u[...] + jnp.sum(p, axis=1, keepdims=True)
        w[...] = fade * w[...] + dot(p, keys.v, "ts,sv->tv", exact)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        y[...] = jnp.where(u[...] == 0, 0, w[...] / u[...]).astype(y.dtype)
        lse[...] = pallas.row(m[...] + jnp.log(u[...]))


def slope(scale, exact, queries, keys, see):
    """The weights of one tile and the gradient to its scores, 0 where hidden."""
    s = scale * dot(queries.as_nan, keys.as_nan, "tk,sk->ts", exact)
    p = jnp.where(see, jnp.exp(s - queries.lse), 0)
    ds = p * (dot(queries.dy, keys.v, "tv,sv->ts", exact) - queries.delta)
    return p, jnp.where(see, ds, 0)


def _rows_kernel(scale, exact, low, high, *refs):
    """dq: all keys of one tile of queries."""
    from jax.experimental import pallas as pl

    q, k, v, dy, lse, delta, first, last, index, dq, total = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    mine = b * pl.num_programs(2) + i

    @pl.when(j < high[mine] - low[mine])
    def _():
        keys, queries = Keys(k, v, index), Queries(q, dy, lse, delta)
        _, ds = slope(scale, exact, queries, keys, seen(first, last, keys.index))
        total[...] += dot(ds, keys.k, "ts,sk->tk", exact)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[...] = scale * total[...]


def _columns_kernel(scale, exact, steps, low, high, *refs):
    """dk, dv: all queries, of every head that reads it, of one tile of keys."""
    from jax.experimental import pallas as pl

    q, k, v, dy, lse, delta, first, last, index, dk, dv, total_k, total_v = refs
    b, j, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        total_k[...], total_v[...] = jnp.zeros_like(total_k), jnp.zeros_like(total_v)

    mine = b * pl.num_programs(2) + j

    @pl.when(jax.lax.rem(n, steps) < high[mine] - low[mine])
    def _():
        keys, queries = Keys(k, v, index), Queries(q, dy, lse, delta)
        p, ds = slope(scale, exact, queries, keys, seen(first, last, keys.index))
        total_k[...] += dot(ds, queries.q, "ts,tk->sk", exact)
        total_v[...] += dot(p, queries.dy, "ts,tv->sv", exact)

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        dk[...], dv[...] = scale * total_k[...], total_v[...]


class Tiles:
    """How a call is cut: tokens of a tile, number of tiles, and which tiles see each other."""

    def __init__(self, block, q, k, first, last, kv_index):
        (self.batch, time, self.heads), (source, self.groups) = q.shape[:3], k.shape[1:3]
        self.t, self.s = tile_size(time, block or BLOCK), tile_size(source, block or BLOCK)
        self.rows, self.columns = -(-time // self.t), -(-source // self.s)
        interval, self.query_extent = tiles.intervals(first, last, self.t)
        index = tiles.cut(kv_index, self.s, -1)
        self.key_extent = tiles.extent(index)
        ends = interval[0].min(-1), interval[1].max(-1)
        self.interval, self.ends = tuple(map(as_rows, interval)), ends
        self.index = as_rows(index)

    def tokens(self, x, tile):
        """(B, T, heads, features) -> (B, heads, whole tiles, features)."""
        padding = [(0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)]
        return rearrange(jnp.pad(x, padding), "b t h k -> b h t k")

    def numbers(self, x):
        """(B, T, H) -> (B, H, tiles, 1, tokens)."""
        return rearrange(tiles.cut(x, self.t), "n b t h -> b h n 1 t")


def tile_size(length, block):
    """The size of the fewest tiles of at most `block`, a multiple of 16."""
    even = -(-length // -(-length // block))
    return -(-even // 16) * 16


def as_rows(x):
    """(tiles, B, tokens) -> (B, 1, tiles, 1, tokens)."""
    return rearrange(x, "n b t -> b 1 n 1 t")


def _call(device, kernel, grid, span, inputs, outputs, scratch):
    """A kernel over (rows, heads, tiles of one side, tiles of the other), with specs beside."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    call = pallas.tpu_call(
        kernel,
        device,
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[pl.BlockSpec(*spec) for spec, _ in inputs],
            out_specs=[pl.BlockSpec(*spec) for spec, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[x for _, x in outputs],
    )
    return call(*(x.ravel() for x in span), *(x for _, x in inputs))


def _within(low, high, mine, j):
    """The j-th tile of a range, the last one again for steps past its end."""
    return jnp.minimum(low[mine] + j, jnp.maximum(high[mine] - 1, 0))


def _by_rows(cut, K, V):
    """Specs of a grid (row, head, tile of queries, step): (q, k, v, number, first, index)."""
    ratio, count = np.int32(cut.heads // cut.groups), np.int32(cut.rows)

    def key(b, h, i, j, low, high):
        return b, jax.lax.div(h, ratio), _within(low, high, b * count + i, j), 0

    def row(b, h, i, j, low, high):
        return b, h, i, 0

    return {
        "q": ((None, None, cut.t, K), row),
        "y": ((None, None, cut.t, V), row),
        "k": ((None, None, cut.s, K), key),
        "v": ((None, None, cut.s, V), key),
        "number": ((None, None, None, 1, cut.t), lambda *at: (*row(*at), 0)),
        "bound": ((None, None, None, 1, cut.t), lambda b, h, i, *at: (b, 0, i, 0, 0)),
        "index": (
            (None, None, None, 1, cut.s),
            lambda b, h, i, j, low, high: (b, 0, _within(low, high, b * count + i, j), 0, 0),
        ),
    }


def _by_columns(cut, K, V):
    """Specs of a grid (row, group, tile of keys, step over the group's heads and queries)."""
    ratio, tiles = np.int32(cut.heads // cut.groups), np.int32(cut.rows)
    count = np.int32(cut.columns)

    def row(b, g, j, n, low, high):
        i = _within(low, high, b * count + j, jax.lax.rem(n, tiles))
        return b, g * ratio + jax.lax.div(n, tiles), i, 0

    def key(b, g, j, n, low, high):
        return b, g, j, 0

    return {
        "q": ((None, None, cut.t, K), row),
        "y": ((None, None, cut.t, V), row),
        "k": ((None, None, cut.s, K), key),
        "v": ((None, None, cut.s, V), key),
        "number": ((None, None, None, 1, cut.t), lambda *at: (*row(*at), 0)),
        "bound": ((None, None, None, 1, cut.t), lambda b, *at: (b, 0, row(b, *at)[2], 0, 0)),
        "index": ((None, None, None, 1, cut.s), lambda b, g, j, *at: (b, 0, j, 0, 0)),
    }


def _forward(how, q, k, v, first, last, kv_index):
    device, scale, block, dtype = how
    residuals = q, k, v, first, last, kv_index
    if q.shape[1] == 1:
        out = decode_pallas_tpu.attention(device, scale, block, dtype, *residuals)
        return out, (*residuals, *out)
    cut, (K, V) = Tiles(block, q, k, first, last, kv_index), (q.shape[3], v.shape[3])
    at = _by_rows(cut, K, V)
    numbers = cut.batch, cut.heads, cut.rows
    y, lse = _call(
        device,
        partial(_forward_kernel, scale, q.dtype == jnp.float32),
        (*numbers, cut.columns),
        tiles.spans(cut.key_extent, *cut.ends),
        [
            (at["q"], cut.tokens(q, cut.t)),
            (at["k"], cut.tokens(k, cut.s)),
            (at["v"], cut.tokens(v, cut.s)),
            *((at["bound"], x) for x in cut.interval),
            (at["index"], cut.index),
        ],
        [
            (at["y"], jax.ShapeDtypeStruct((*numbers[:2], cut.rows * cut.t, V), dtype)),
            (at["number"], jax.ShapeDtypeStruct((*numbers, 1, cut.t), jnp.float32)),
        ],
        [(cut.t, 1), (cut.t, 1), (cut.t, V)],
    )
    y = rearrange(y, "b h t v -> b t h v")[:, : q.shape[1]]
    lse = rearrange(lse, "b h n 1 t -> b (n t) h")[:, : q.shape[1]]
    return (y, lse), (*residuals, y, lse)


def _gradients(how, q, k, v, dy, lse, delta, first, last, kv_index):
    device, scale, block, _ = how
    cut, (K, V) = Tiles(block, q, k, first, last, kv_index), (q.shape[3], v.shape[3])
    tokens = ("q", "k", "v", "y", "number", "number", "bound", "bound", "index")
    arrays = (
        cut.tokens(q, cut.t),
        cut.tokens(k, cut.s),
        cut.tokens(v, cut.s),
        cut.tokens(dy.astype(q.dtype), cut.t),
        cut.numbers(lse),
        cut.numbers(delta),
        *cut.interval,
        cut.index,
    )
    exact = q.dtype == jnp.float32

    def zeros(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    at = _by_rows(cut, K, V)
    (dq,) = _call(
        device,
        partial(_rows_kernel, scale, exact),
        (cut.batch, cut.heads, cut.rows, cut.columns),
        tiles.spans(cut.key_extent, *cut.ends),
        [(at[name], x) for name, x in zip(tokens, arrays, strict=True)],
        [(at["q"], zeros(cut.batch, cut.heads, cut.rows * cut.t, K))],
        [(cut.t, K)],
    )
    at = _by_columns(cut, K, V)
    dk, dv = _call(
        device,
        partial(_columns_kernel, scale, exact, np.int32(cut.rows)),
        (cut.batch, cut.groups, cut.columns, cut.heads // cut.groups * cut.rows),
        tiles.spans(cut.query_extent, *cut.key_extent),
        [(at[name], x) for name, x in zip(tokens, arrays, strict=True)],
        [
            (at[n], zeros(cut.batch, cut.groups, cut.columns * cut.s, w))
            for n, w in (("k", K), ("v", V))
        ],
        [(cut.s, K), (cut.s, V)],
    )
    lengths = (q.shape[1], dq), (k.shape[1], dk), (k.shape[1], dv)
    return tuple(rearrange(x, "b h t k -> b t h k")[:, :n] for n, x in lengths)


def _backward(how, residuals, cotangents):
    q, k, v, first, last, kv_index, y, lse = residuals
    dy, dlse = cotangents
    slope = q, k, v, dy, lse, xla.delta(y, dy, dlse), first, last, kv_index
    dq, dk, dv = _gradients(how, *slope)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, first, last, kv_index):
    return _forward(how, q, k, v, first, last, kv_index)[0]


_attention.defvjp(keep.rule(_forward), _backward)
