"""One query a row against a cache, in plain XLA: the cache is read as it lies.

Blocks of keys from the first to the last that any row sees, an online softmax over them. Products
are of the keys as they are. Where one is not finite, for any row, `xla.py` does all of it again by
the masks, for which it copies the keys. Keys (B, S, G, K) that are no cache's are copied first.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from ..monoid import LOWEST
from . import tiles

BLOCK = 1024  # keys at a time; blocks of 4,096 took up to 7 times as long on a CPU core


def attention(tiled, query, k, v, first, last, kv_index, scale, block, dtype):
    """y (B, 1, H, V) and lse (B, 1, H) of queries (B, 1, H, K), else what `tiled` makes of all."""
    (length, groups), exact = k.shape[1:3], jnp.promote_types(jnp.float32, k.dtype)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as a cache lies
    q = rearrange(query, "b 1 (g r) k -> b g r k", g=groups)
    block = min(block, length)
    span = tiles.span(*tiles.extent(tiles.cut(kv_index, block, -1)), first[:, 0], last[:, 0])

    def step(j, carry):
        m, u, w, sound = carry
        # With j, and so in the loop: else XLA takes the product with a single block's keys out of
        # it, for which it copies a cache that is written in the same program.
        j, keys, values = jax.lax.optimization_barrier((j, k, v))
        at = jnp.minimum(j * block, length - block)  # the last block begins within the one before
        some = partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=block)
        slots = at + jnp.arange(block, dtype=jnp.int32)
        see = tiles.see(first, last, some(kv_index, axis=1))[..., 0, :] & (slots >= j * block)
        s = scale * tiles.dot("bgrk,bgsk->bgrs", q, some(keys, axis=2))
        top = jnp.maximum(m, jnp.max(jnp.where(see, s, LOWEST), axis=-1))
        p = jnp.where(see, jnp.exp(s - top[..., None]), 0).astype(v.dtype)
        fade = jnp.exp(m - top)
        more = tiles.dot("bgrs,bgsv->bgrv", p, some(values, axis=2))
        sound &= jnp.isfinite(s).all() & jnp.isfinite(more).all()
        return top, fade * u + p.sum(-1, dtype=exact), fade[..., None] * w + more, sound

    m = jnp.full(q.shape[:-1], LOWEST, exact)
    empty = m, jnp.zeros_like(m), jnp.zeros((*m.shape, v.shape[3]), exact), jnp.bool(True)
    m, u, w, sound = jax.lax.fori_loop(*span, step, empty)

    def done():
        y = jnp.where(u[..., None] == 0, 0, w / u[..., None]).astype(dtype)
        return tuple(rearrange(x, "b g r ... -> b 1 (g r) ...") for x in (y, m + jnp.log(u)))

    def again():
        keys = k.swapaxes(1, 2), v.swapaxes(1, 2)  # in here, where it copies them
        return tiled(query, *keys, first, last, kv_index, scale, block, dtype)

    return jax.lax.cond(sound, done, again)
