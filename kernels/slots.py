"""Rows to slots and back: gathers whose gradients are gathers.

slots (n, k) says where each of k assignments of n rows goes; S or more: nowhere. No two share one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def inverse(slots: Int[Array, "n k"], count: int) -> Int[Array, "S"]:
    """The assignment in each of `count` slots; those that there are, where there is none."""
    each = jnp.arange(slots.size, dtype=jnp.int32)
    none = jnp.full(count, slots.size, jnp.int32)
    return none.at[slots.reshape(-1)].set(each, mode="drop", unique_indices=True)


@jax.custom_vjp
def take(x: Float[Array, "n D"], rows: Int[Array, "S"], slots: Int[Array, "n k"]):
    """x of each slot's assignment (S, D), zero where it has none: rows[slots[i, j]] = i k + j."""
    return x.at[rows // slots.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collect(y: Float[Array, "S D"], rows: Int[Array, "S"], slots: Int[Array, "n k"]):
    """y of each assignment's slot (n, k, D), zero where it has none."""
    return y.at[slots].get(mode="fill", fill_value=0)


def _take_backward(where, g):
    rows, slots = where
    exact = jnp.promote_types(jnp.float32, g.dtype)
    return collect(g, rows, slots).sum(axis=1, dtype=exact).astype(g.dtype), None, None


def _collect_backward(where, g):
    rows, slots = where
    return g.reshape(slots.size, -1).at[rows].get(mode="fill", fill_value=0), None, None


take.defvjp(lambda x, rows, slots: (take(x, rows, slots), (rows, slots)), _take_backward)
collect.defvjp(lambda y, rows, slots: (collect(y, rows, slots), (rows, slots)), _collect_backward)
