"""Fixed-query attention by chunks: pairs inside a chunk, the softmax monoid from chunk to chunk.

With m_t the maximum so far and P_ts = e^(s_s - m_t) over the pairs s <= t of one document,
    u_t = sum_s P_ts + e^(m - m_t) u,   w_t = sum_s P_ts v_s + e^(m - m_t) w,   y_t = w_t / u_t.
The backward is the transposed recurrence, with exponents that are never positive either: from
dw_t = dy_t / u_t, du_t = -dw_t . y_t and the cotangents of the last state,
    dv_s = sum_t P_ts dw_t,   ds_s = sum_t P_ts (dw_t . v_s + du_t),
and a chunk sends to those before it the cotangents of a state, sum_t e^(m - m_t) (du_t, dw_t).
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import keep, tuned
from ..monoid import LOWEST
from . import tiles

CHUNK = 16  # with 8 the fastest of 8 to 128 on one CPU core at T=2048, K=V=64, and half its memory


def fixed_query(q, k, v, scale, state, reset, chunk):
    """Scan over chunks. Saves T / chunk summaries beside its inputs."""
    chunk = chunk or tuned.size("fixed_query", "xla", CHUNK, **tiles.features(k, v))
    chunks = -(-k.shape[1] // chunk)
    return _fixed_query(q, k, v, state, reset, scale, -(-k.shape[1] // chunks))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _fixed_query(q, k, v, state, reset, scale, chunk):
    return _forward(q, k, v, state, reset, scale, chunk)[0]


def _forward(q, k, v, state, reset, scale, chunk):
    exact = state[0].dtype  # of all that the loop touches: it is slow over narrower arrays on a CPU
    scaled = _scaled(q, scale, k.shape[2], exact)

    def body(state, tokens):
        _, _, _, (m, u, w) = _chunk(scaled, tokens, state)
        y = rearrange(w / u[..., None], "b g r c v -> b c (g r) v")
        return (m[..., -1], u[..., -1], w[..., -1, :]), (state, y)

    start = _grouped(state, k.shape[2])
    final, (starts, y) = jax.lax.scan(body, start, _tokens(k, v, reset, chunk, exact))
    y = rearrange(y, "n b c h v -> b (n c) h v")[:, : k.shape[1]]
    return (y.astype(jnp.result_type(q, k, v)), _ungrouped(final)), (q, k, v, reset, starts, final)


def _backward(scale, chunk, residuals, cotangents):
    q, k, v, reset, starts, final = residuals
    exact, groups = final[0].dtype, k.shape[2]
    scaled = _scaled(q, scale, groups, exact)

    def body(carry, x):
        (dtop, dmass, dw, dq), (tokens, state, dy) = carry, x
        s, p, fade, (m_t, u_t, w_t) = _chunk(scaled, tokens, state)
        y = w_t / u_t[..., None]
        dw_t = rearrange(dy, "b c (g r) v -> b g r c v", g=groups) / u_t[..., None]
        dw_t = dw_t.at[..., -1, :].add(dw)
        dmass_t = jnp.zeros_like(u_t).at[..., -1].set(dmass)

        ds = _dot("bgrtv,bsgv->bgrts", dw_t, tokens[1]) + (dmass_t - (dw_t * y).sum(-1))[..., None]
        ds = (p * ds).sum(-2)
        # The maximum came in with the state or is the score of a token. Where several are equal,
        # each takes half of what those after it leave, as the token recurrence has it.
        came = (fade[..., -1] > 0) & (state[0] == m_t[..., -1])
        largest = s[..., -1, :] == m_t[..., -1:]
        count = jnp.cumsum(largest, axis=-1, dtype=jnp.int32)
        later, earlier = count[..., -1:] - count, (count > 1) | came[..., None]
        halves = jnp.exp2(-(later + earlier).astype(exact))
        ds = ds + jnp.where(largest, dtop[..., None] * halves, 0)
        dtop = jnp.where(came, dtop * jnp.exp2(-count[..., -1].astype(exact)), 0)

        dv = _dot("bgrts,bgrtv->bsgv", p, dw_t)
        dk = _dot("bgrc,grk->bcgk", ds, scaled)
        dq = dq + _dot("bgrc,bcgk->grk", ds, tokens[0])
        dmass = (fade * (dmass_t + (dw_t * (_mean(state)[..., None, :] - y)).sum(-1))).sum(-1)
        return (dtop, dmass, _dot("bgrt,bgrtv->bgrv", fade, dw_t), dq), (dk, dv)

    # Between chunks du goes as dmass = du + dw . w / u: a sum of dw_t . (w / u - y_t), which keeps
    # its digits where the state outweighs what follows. dtop is what a reader of the state sees of
    # its maximum besides through u and w, which follow it.
    dm, du, dw = _grouped(cotangents[1], groups)
    dmass = du + (dw * _mean(final)).sum(-1)
    carry = dm - final[1] * dmass, dmass, dw, jnp.zeros_like(scaled)
    inputs = _tokens(k, v, reset, chunk, exact), starts, _split(cotangents[0].astype(exact), chunk)
    (dtop, dmass, dw, dq), tokens = jax.lax.scan(body, carry, inputs, reverse=True)
    state = jax.tree.map(lambda x: x[0], starts)
    du = dmass - (dw * _mean(state)).sum(-1)
    state = _ungrouped((dtop + state[1] * dmass, du, dw))
    dk, dv = (rearrange(x, "n b c ... -> b (n c) ...")[:, : k.shape[1]] for x in tokens)
    dq = scale * rearrange(dq, "g r k -> (g r) k")
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), state, None


_fixed_query.defvjp(keep.rule(_forward), _backward)


def _chunk(scaled, tokens, state):
    """Visible scores and weights P (B G R T S), share of the state that came in, every state."""
    (k, v, reset, real), (m, u, w) = tokens, state
    s = _dot("grk,bcgk->bgrc", scaled, k)[..., None, :]
    see, keep = jnp.tril(jnp.ones((k.shape[1],) * 2, bool)) & real, True
    if reset is not None:
        document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
        see = (see & (document[:, :, None] == document[:, None, :]))[:, None, None]
        keep = (document == 0)[:, None, None]
    s = jnp.where(see, s, LOWEST)
    m_t = jnp.maximum(s.max(-1), jnp.where(keep, m[..., None], LOWEST))
    p = jnp.where(see, jnp.exp(s - m_t[..., None]), 0)
    fade = jnp.where(keep, jnp.exp(m[..., None] - m_t), 0)
    u_t = p.sum(-1) + fade * u[..., None]
    w_t = _dot("bgrts,bsgv->bgrtv", p, v) + fade[..., None] * w[..., None, :]
    return s, p, fade, (m_t, u_t, w_t)


def _mean(state):
    """w / u, and 0 of a state of nothing."""
    _, u, w = state
    return jnp.where(u[..., None] == 0, 0, w / u[..., None])


def _dot(equation, x, y):
    return jnp.einsum(equation, x, y, precision="highest")


def _scaled(q, scale, groups, dtype):
    return scale * rearrange(q.astype(dtype), "(g r) k -> g r k", g=groups)


def _grouped(state, groups):
    return jax.tree.map(lambda x: rearrange(x, "b (g r) ... -> b g r ...", g=groups), state)


def _ungrouped(state):
    return jax.tree.map(lambda x: rearrange(x, "b g r ... -> b (g r) ..."), state)


def _split(x, chunk):
    """(B, T, ...) -> (chunks, B, chunk, ...), the last chunk filled with zeros."""
    rest = -x.shape[1] % chunk
    if rest:
        x = jnp.pad(x, [(0, rest if axis == 1 else 0) for axis in range(x.ndim)])
    return rearrange(x, "b (n c) ... -> n b c ...", c=chunk)


def _tokens(k, v, reset, chunk, dtype):
    """Chunks of (k, v, reset, whether the token is there)."""
    reset = None if reset is None else _split(reset, chunk)
    real = _split(jnp.ones((1, k.shape[1]), bool), chunk)[:, 0]
    return _split(k.astype(dtype), chunk), _split(v.astype(dtype), chunk), reset, real
