"""Softmax attention as its equation says it, one query after another. Differentiates any way."""

import jax
import jax.numpy as jnp
from einops import rearrange

from ..monoid import LOWEST


def one(q_GRK, k_SGK, v_SGV, see_S):
    """One query of one sequence; hidden keys are taken out before anything multiplies them."""
    k_SGK = jnp.where(see_S[:, None, None], k_SGK, 0)
    v_SGV = jnp.where(see_S[:, None, None], v_SGV, 0)
    s_GRS = jnp.einsum("grk,sgk->grs", q_GRK, k_SGK, precision="highest")
    s_GRS = jnp.where(see_S, s_GRS, LOWEST)
    m_GR = jax.lax.stop_gradient(s_GRS.max(-1))
    p_GRS = jnp.where(see_S, jnp.exp(s_GRS - m_GR[..., None]), 0)
    u_GR = jnp.where(see_S.any(), p_GRS.sum(-1), 1)
    y_GRV = jnp.einsum("grs,sgv->grv", p_GRS, v_SGV, precision="highest") / u_GR[..., None]
    return y_GRV, jnp.where(see_S.any(), m_GR + jnp.log(u_GR), -jnp.inf)


def attention(q, k, v, first, last, kv_index, scale, block, dtype):
    """The definition; `block` has no meaning here and is not read."""
    del block
    q, k, v = (x.astype(jnp.promote_types(jnp.float32, q.dtype)) for x in (q, k, v))
    q = rearrange(q, "b t (g r) k -> t b g r k", g=k.shape[2])

    @jax.checkpoint
    def step(query):
        q, first, last = query
        see = (first[:, None] <= kv_index) & (kv_index <= last[:, None]) & (kv_index >= 0)
        return jax.vmap(one)(q * scale, k, v, see)

    y, lse = jax.lax.map(step, (q, first.T, last.T))
    return (
        rearrange(y, "t b g r v -> b t (g r) v").astype(dtype),
        rearrange(lse, "t b g r -> b t (g r)"),
    )
