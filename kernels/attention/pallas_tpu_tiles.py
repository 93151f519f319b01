"""Tiles in a TPU's VMEM, with rows that hold a non-finite number read as nan or as zeros."""

import jax.numpy as jnp

from ..pallas import column


class Keys:
    """A tile of keys and values, bad rows read as nan or as zeros."""

    def __init__(self, k, v, index):
        k, v = k[...].astype(jnp.float32), v[...].astype(jnp.float32)
        bad = unsound(k) | unsound(v)
        self.as_nan, self.k = jnp.where(bad, jnp.nan, k), jnp.where(bad, 0, k)
        self.v, self.index = jnp.where(bad, 0, v), index[...]


class Queries:
    """The same of queries, with their cotangents and what the weights are made from."""

    def __init__(self, q, dy, lse, delta):
        q, dy = q[...].astype(jnp.float32), dy[...].astype(jnp.float32)
        self.lse, self.delta = column(lse[...]), column(delta[...])
        bad = unsound(q) | unsound(dy) | unsound(self.delta)
        self.as_nan, self.q = jnp.where(bad, jnp.nan, q), jnp.where(bad, 0, q)
        self.dy = jnp.where(bad, 0, dy)


def unsound(x):
    """Which rows hold a non-finite number, (rows, 1)."""
    finite = jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0)  # comparisons with nan are false
    return jnp.max(finite, axis=1, keepdims=True) > 0


def seen(first, last, index):
    """Which keys (columns) each query (rows) may see."""
    return (column(first[...]) <= index) & (index <= column(last[...])) & (index >= 0)
