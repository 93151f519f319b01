"""FlashAttention-2 in plain XLA: tiles of scores, an online softmax, a backward that recomputes.

A tile of scores is (B, G, R, T, S): R query heads read one group of keys, so that no key is copied.
Loops run from the first to the last tile that the masks let through.
One query a row goes by `decode_xla`, and here only where a number is not finite.

Non-finite numbers reach what the masks let them reach and nothing else. Tiles are masked by
`where`; a product whose result is masked reads a row that holds such numbers as nan, and a product
that sums over the masked axis reads it as zeros.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import keep, tuned
from ..monoid import LOWEST
from . import decode_xla, tiles

BLOCK = 128  # on one CPU core at T=2048, K=V=64 as fast as 256, and closer to a window's edges


def attention(q, k, v, first, last, kv_index, scale, block, dtype):
    """Key s is seen by query t iff first_t <= kv_index_s <= last_t. Saves y and lse, O(T)."""
    about = tiles.features(q, v)
    if q.shape[1] == 1:
        about = {"G": k.shape[2]} | about
        block = block or tuned.size("decode", "xla", decode_xla.BLOCK, **about)
    else:
        block = block or tuned.size("attention", "xla", BLOCK, **about)
    return _attention(q, k, v, first, last, kv_index, scale, block, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, first, last, kv_index, scale, block, dtype):
    return _forward(q, k, v, first, last, kv_index, scale, block, dtype)[0]


def _forward(q, k, v, first, last, kv_index, scale, block, dtype):
    run = partial(decode_xla.attention, _tiled) if q.shape[1] == 1 else _tiled
    out = run(q, k, v, first, last, kv_index, scale, block, dtype)
    return out, (q, k, v, first, last, kv_index, *out)


def _tiled(q, k, v, first, last, kv_index, scale, block, dtype):
    sizes = _sizes(q, k, block)
    exact = jnp.promote_types(jnp.float32, q.dtype)
    keys, extent = _keys(k, v, kv_index, sizes[1])
    interval, _ = tiles.intervals(first, last, sizes[0])

    def row(query):
        q, first, last = query

        def column(j, carry):
            m, u, w = carry
            k, _, v, index = _tile(keys, j)
            see = tiles.see(first, last, index)
            s = jnp.where(see, scale * tiles.dot("bgrtk,bgsk->bgrts", q, k), LOWEST)
            top = jnp.maximum(m, s.max(-1))
            p = jnp.where(see, jnp.exp(s - top[..., None]), 0).astype(v.dtype)
            fade = jnp.exp(m - top)
            u = fade * u + p.sum(-1, dtype=exact)
            return top, u, fade[..., None] * w + tiles.dot("bgrts,bgsv->bgrtv", p, v)

        m = jnp.full(q.shape[:-1], LOWEST, exact)
        empty = m, jnp.zeros_like(m), jnp.zeros((*m.shape, v.shape[3]), exact)
        span = tiles.span(*extent, first.min(-1), last.max(-1))
        m, u, w = jax.lax.fori_loop(*span, column, empty)
        return jnp.where(u[..., None] == 0, 0, w / u[..., None]), m + jnp.log(u)

    y, lse = jax.lax.map(row, (_heads(q, k.shape[2], sizes[0]), *interval))
    return _join(y, q.shape[1]).astype(dtype), _join(lse, q.shape[1])


def _backward(scale, block, dtype, residuals, cotangents):
    q, k, v, first, last, kv_index, y, lse = residuals
    dy, dlse = cotangents
    slope = q, k, v, dy, lse, delta(y, dy, dlse), first, last, kv_index
    dq, dk, dv = gradients(*slope, scale, block)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


def delta(y, dy, dlse):
    """dy . y - dlse, a number a query: what a weight's gradient is compared with."""
    y, dy = y.astype(dlse.dtype), dy.astype(dlse.dtype)
    return jnp.einsum("bthv,bthv->bth", dy, y, precision="highest") - dlse


def gradients(q, k, v, dy, lse, delta, first, last, kv_index, scale, block):
    """dS = P (dP - delta) by columns of tiles, of which each adds to the dq of its rows."""
    block = block or tuned.size("attention", "xla", BLOCK, **tiles.features(q, v))
    exact, groups, sizes = lse.dtype, k.shape[2], _sizes(q, k, block)
    dy = dy.astype(q.dtype)
    bad = ~(jnp.isfinite(q).all(-1) & jnp.isfinite(dy).all(-1) & jnp.isfinite(delta))[..., None]
    sides = jnp.where(bad, jnp.nan, q), jnp.where(bad, 0, q), jnp.where(bad, 0, dy), lse, delta
    queries = (*(_heads(x, groups, sizes[0]) for x in sides),)
    keys, _ = _keys(k, v, kv_index, sizes[1])
    interval, query_extent = tiles.intervals(first, last, sizes[0])

    def tile(query, key):
        """The weights of one tile and the gradient to its scores, 0 where hidden."""
        (q, _, dy, lse, delta, first, last), (k, _, v, index) = query, key
        see = tiles.see(first, last, index)
        s = scale * tiles.dot("bgrtk,bgsk->bgrts", q, k)
        p = jnp.where(see, jnp.exp(s - lse[..., None]), 0)
        ds = p * (tiles.dot("bgrtv,bgsv->bgrts", dy, v) - delta[..., None])
        return p, jnp.where(see, ds, 0).astype(q.dtype)

    def column(dq, key):
        def row(i, carry):
            dq, dk, dv = carry
            query = _tile((*queries, *interval), i)
            p, ds = tile(query, key)
            dk = dk + tiles.dot("bgrts,bgrtk->bgsk", ds, query[1])
            dv = dv + tiles.dot("bgrts,bgrtv->bgsv", p.astype(ds.dtype), query[2])
            more = _tile(dq, i) + tiles.dot("bgrts,bgsk->bgrtk", ds, key[1])
            return jax.lax.dynamic_update_index_in_dim(dq, more, i, 0), dk, dv

        _, _, v, index = key
        zeros = jnp.zeros(key[0].shape, exact), jnp.zeros(v.shape, exact)
        span = tiles.span(*query_extent, *tiles.extent(index))
        dq, *grads = jax.lax.fori_loop(*span, row, (dq, *zeros))
        return dq, grads

    dq, grads = jax.lax.scan(column, jnp.zeros(queries[0].shape, exact), keys)
    dk, dv = (_join(x[:, :, :, None], k.shape[1]) for x in grads)
    return scale * _join(dq, q.shape[1]), scale * dk, dv


_attention.defvjp(keep.rule(_forward), _backward)


def visits(first, last, kv_index, block=BLOCK):
    """Tiles of scores of a call of several queries: (in its forward, in its backward)."""
    sizes = _sizes(first, kv_index, block)
    interval, query_extent = tiles.intervals(first, last, sizes[0])
    key_extent = tiles.extent(tiles.cut(kv_index, sizes[1], -1))

    def total(extent, first, last):
        low, high = jax.vmap(partial(tiles.span, *extent))(first, last)
        return (high - low).sum()

    rows = total(key_extent, interval[0].min(-1), interval[1].max(-1))
    return rows, total(query_extent, *key_extent)


def _sizes(q, k, block):
    """Tokens in a tile of queries and in one of keys."""
    return tiles.even(q.shape[1], block), tiles.even(k.shape[1], block)


def _heads(x, groups, block):
    """(B, T, H, ...) -> (tiles, B, G, R, block, ...)."""
    return rearrange(tiles.cut(x, block), "n b t (g r) ... -> n b g r t ...", g=groups)


def _join(x, length):
    """(tiles, B, G, R, block, ...) -> (B, length, H, ...)."""
    return rearrange(x, "n b g r t ... -> b (n t) (g r) ...")[:, :length]


def _keys(k, v, index, block):
    """Tiles of (k, bad rows nan; k, bad rows 0; v, bad rows 0; index), and their extents."""
    bad = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))[..., None]
    sides = jnp.where(bad, jnp.nan, k), jnp.where(bad, 0, k), jnp.where(bad, 0, v)
    index = tiles.cut(index, block, -1)
    keys = *(_heads(x, k.shape[2], block)[:, :, :, 0] for x in sides), index
    return keys, tiles.extent(index)


def _tile(tree, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
