"""The selective scan as the monoid says it: lift every token, scan, read. T D N elements."""

import jax.numpy as jnp

from .. import monoid


def rule(A):
    """Decay whose log is the sum of delta (D,), N times smaller than the log itself, delta A."""
    return monoid.decay(lambda delta, h: jnp.exp(delta[..., None] * A) * h)


def lift(u, delta, B):
    """One token's summary: u, delta (..., D), B (..., N)."""
    return delta, (delta * u)[..., None] * B[..., None, :]


def read(h, C):
    """y = h C: h (..., D, N), C (..., N)."""
    return jnp.einsum("...dn,...n->...d", h, C, precision="highest")


def selective_scan(u, delta, A, B, C, D, state, reset, chunk, schedule=monoid.scan):
    """The token recurrence; `chunk` has no meaning here and is not read."""
    del chunk
    dtype = u.dtype
    u, delta, B, C = (jnp.moveaxis(x, 1, 0).astype(state.dtype) for x in (u, delta, B, C))
    elements, prefix = lift(u, delta, B), (jnp.zeros_like(delta[0]), state)
    if reset is None:
        _, h = schedule(rule(A), elements, prefix)
    else:
        start = jnp.zeros_like(reset[:, 0])
        _, (_, h) = schedule(monoid.resettable(rule(A)), (reset.T, elements), (start, prefix))
    return jnp.moveaxis(read(h, C) + D * u, 0, 1).astype(dtype), h[-1]


def selective_scan_associative(u, delta, A, B, C, D, state, reset, chunk):
    """The same elements by `lax.associative_scan`."""
    return selective_scan(u, delta, A, B, C, D, state, reset, chunk, monoid.associative)
