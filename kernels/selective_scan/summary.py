"""What a span of tokens leaves behind, without its outputs: an element of a resettable `decay`."""

import jax
import jax.numpy as jnp

from ..documents import last_document
from ..monoid import Monoid, decay

CHUNK = 32


def monoid(A) -> Monoid:
    """The logs of a span are A times its sum of delta, so only that sum (B, D) is kept."""
    return decay(lambda delta, h: jnp.exp(delta[..., None] * A) * h)


def summarize(u, delta, A, B, reset, state):
    """(flag (B,), (sum of delta (B, D), h (B, D, N))); `state` gives shape and dtype.

    h = sum_t exp(A (sum of delta after t)) delta_t u_t B_t over the tokens of the span's last
    document, CHUNK of them at a time, computed again in the backward.
    """
    exact, time = state.dtype, u.shape[1]
    flag, (u, delta, B) = last_document(reset, tuple(x.astype(exact) for x in (u, delta, B)))
    from_here = jax.lax.cumsum(delta, axis=1, reverse=True)
    after = jnp.pad(from_here[:, 1:], [(0, 0), (0, 1), (0, 0)])
    size = min(CHUNK, time)

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, -time % size), (0, 0)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[2]), 1, 0)

    @jax.checkpoint
    def add(h, x):
        after, given, B = x
        weights = jnp.exp(after[..., None] * A) * given[..., None]
        return h + jnp.einsum("btdn,btn->bdn", weights, B, precision="highest"), None

    h, _ = jax.lax.scan(add, jnp.zeros_like(state), tuple(map(chunks, (after, delta * u, B))))
    return flag, (from_here[:, 0], h)
