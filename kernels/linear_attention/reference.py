"""Linear attention as the monoid says it: lift every token, scan, read. T K V elements a head."""

import jax.numpy as jnp
from einops import repeat

from .. import monoid


def lift(k, v, log_decay):
    """One token's summary: k (..., K), v (..., V), log_decay (...) or (..., K)."""
    return log_decay, k[..., :, None] * v[..., None, :]


def read(state, q):
    """y = S^T q: state (..., K, V), q (..., K)."""
    return jnp.einsum("...kv,...k->...v", state, q, precision="highest")


def linear_attention(q, k, v, log_decay, state, reset, chunk, schedule=monoid.scan):
    """The token recurrence; `chunk` has no meaning here and is not read."""
    del chunk
    heads, dtype = state.shape[1], jnp.result_type(q, k, v)

    def by_time(x):
        return repeat(x, "b t g ... -> t b (g r) ...", r=heads // x.shape[2]).astype(state.dtype)

    q, k, v = by_time(q), by_time(k), by_time(v)
    log = log_decay if log_decay.ndim > 1 else jnp.broadcast_to(log_decay, (1, 1, heads))
    log = jnp.broadcast_to(jnp.moveaxis(log, 1, 0), (*q.shape[:3], *log.shape[3:]))
    elements, prefix = lift(k, v, log), (jnp.zeros_like(log[0]), state)
    if reset is None:
        _, states = schedule(monoid.DECAY, elements, prefix)
    else:
        flags, none = reset.T, jnp.zeros_like(reset[:, 0])
        rule = monoid.resettable(monoid.DECAY)
        _, (_, states) = schedule(rule, (flags, elements), (none, prefix))
    return jnp.moveaxis(read(states, q), 0, 1).astype(dtype), states[-1]


def linear_attention_associative(q, k, v, log_decay, state, reset, chunk):
    """The same elements by `lax.associative_scan`."""
    return linear_attention(q, k, v, log_decay, state, reset, chunk, monoid.associative)
