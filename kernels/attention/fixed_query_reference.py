"""Fixed-query attention as the monoid says it: lift each token, scan, read. T V elements a head."""

import jax
import jax.numpy as jnp
from einops import repeat

from .. import monoid


def lift(q, k, v, scale):
    """One token's summary: q (..., K), k (..., K), v (..., V)."""
    s = scale * jnp.einsum("...k,...k->...", q, k, precision="highest")
    return s, jnp.ones_like(s), v


def read(state):
    """y = w / u."""
    _, u, w = state
    return w / u[..., None]


def fixed_query(q, k, v, scale, state, reset, chunk, schedule=monoid.scan):
    """The token recurrence; `chunk` has no meaning here and is not read."""
    del chunk
    heads, exact, dtype = q.shape[0], state[0].dtype, jnp.result_type(q, k, v)

    def by_time(x):
        return repeat(x.astype(exact), "b t g ... -> t b (g r) ...", r=heads // x.shape[2])

    elements = lift(q.astype(exact), by_time(k), by_time(v), scale)
    if reset is None:
        states = schedule(monoid.SOFTMAX, elements, state)
    else:
        rule = monoid.resettable(monoid.SOFTMAX)
        none = jnp.zeros_like(reset[:, 0])
        _, states = schedule(rule, (reset.T, elements), (none, state))
    return jnp.moveaxis(read(states), 0, 1).astype(dtype), jax.tree.map(lambda x: x[-1], states)


def fixed_query_associative(q, k, v, scale, state, reset, chunk):
    """The same elements by `lax.associative_scan`."""
    return fixed_query(q, k, v, scale, state, reset, chunk, monoid.associative)
