"""FlashAttention-2 in plain XLA: tiles of scores, an online softmax, a backward that recomputes.

A tile is (B, G, R, T, S): R query heads share a key and value group, so that no key is copied. Loops
run from the first to the last tile that any query may see. Hidden entries of a tile are zeros by
`where`; products whose sum runs over hidden entries read operands in which non-finite rows are
zeros, and the other products read them as nan: so they reach what may see them and nothing else.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from ..monoid import LOWEST

BLOCK = 256  # fastest of 64 to 512 on one CPU core at T=2048, K=V=64


def attention(q, k, v, first, last, kv_index, scale, block):
    block = BLOCK if block is None else block
    return _attention(q, k, v, first, last, kv_index, scale, block)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, first, last, kv_index, scale, block):
    return _forward(q, k, v, first, last, kv_index, scale, block)[0]


def _forward(q, k, v, first, last, kv_index, scale, block):
    queries, keys = _queries(q, first, last, k.shape[2], block), _keys(k, v, kv_index, block)
    rows = _queries(q, first, last, k.shape[2], block)
    exact = jnp.promote_types(jnp.float32, q.dtype)

    def outer(_, query):
        q, first, last = query

        def inner(j, carry):
            m, u, w = carry
            k, v, index, _ = _at(keys, j)
            see = _see(first, last, index)
            s = jnp.where(see, scale * _dot("bgrtk,bgsk->bgrts", q, k), LOWEST)
            top = jnp.maximum(m, s.max(-1))
            p = jnp.where(see, jnp.exp(s - top[..., None]), 0).astype(v.dtype)
            fade = jnp.exp(m - top)
            u = fade * u + p.sum(-1, dtype=exact)
            return top, u, fade[..., None] * w + _dot("bgrts,bgsv->bgrtv", p, v)

        m = jnp.full(q.shape[:-1], LOWEST, exact)
        w = jnp.zeros((*m.shape, v.shape[3]), exact)
        start = m, jnp.zeros_like(m), w
        m, u, w = jax.lax.fori_loop(*_tiles(first, last, keys), inner, start)
        y = jnp.where(u[..., None] == 0, 0, w / u[..., None]).astype(v.dtype)
        return None, (y, m + jnp.log(u))
    ...
