"""What a span of tokens leaves behind, without its outputs: an element of `resettable(SOFTMAX)`."""

import jax.numpy as jnp
from einops import repeat

from ..documents import last_document
from ..monoid import LOWEST


def summarize(q, k, v, scale, reset, state):
    """(flag (B,), (m (B, H), u (B, H), w (B, H, V))) of the span's last document."""
    heads, exact = q.shape[0], state[0].dtype
    there = jnp.ones(k.shape[:2], exact)
    flag, (k, v, there) = last_document(reset, (k, v, there))
    by_head = "b t g c -> b t (g r) c"
    k, v = (repeat(x.astype(exact), by_head, r=heads // x.shape[2]) for x in (k, v))
    s = scale * jnp.einsum("hk,bthk->bth", q.astype(exact), k, precision="highest")
    s = jnp.where(there[..., None] > 0, s, LOWEST)
    m = s.max(axis=1)
    weights = jnp.exp(s - m[:, None])
    w = jnp.einsum("bth,bthv->bhv", weights, v, precision="highest")
    return flag, (m, weights.sum(axis=1), w)
