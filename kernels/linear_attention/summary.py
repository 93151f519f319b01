"""What a span of tokens leaves behind, without its outputs: an element of `resettable(DECAY)`."""

import jax
import jax.numpy as jnp
from einops import repeat

from ..documents import last_document


def summarize(k, v, log_decay, reset, state):
    """(flag (B,), (log (B, H) or (B, H, K), S (B, H, K, V))); `state` gives shape and dtype.

    S = sum_j exp(sum of the logs after j) k_j v_j^T over the tokens of the span's last document.
    Every exponent is one sum of logs, so nothing cancels, and what is far from the end is zero.
    """
    (batch, time), heads, exact = k.shape[:2], state.shape[1], state.dtype
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, time, heads))
    flag, (k, v, log_decay) = last_document(reset, (k, v, log_decay.astype(exact)))
    from_here = jax.lax.cumsum(log_decay, axis=1, reverse=True)
    after = jnp.pad(from_here[:, 1:], [(0, 0), (0, 1)] + [(0, 0)] * (log_decay.ndim - 2))
    by_head = "b t g c -> b t (g r) c"
    k, v = (repeat(x.astype(exact), by_head, r=heads // x.shape[2]) for x in (k, v))
    kept = k * jnp.exp(after if after.ndim == 4 else after[..., None])
    S = jnp.einsum("bthk,bthv->bhkv", kept, v, precision="highest")
    return flag, (from_here[:, 0], S)
