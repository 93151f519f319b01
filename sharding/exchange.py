"""Rows from each device of a group to each: all the room that there is, or only what is in it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from ..kernels.dispatch import target

RAGGED = ("gpu", "tpu")  # the backends for which XLA has a ragged all-to-all
Axes = tuple[str, ...]


def all_to_all(axes: Axes, x: Num[Array, "W *rest"], node: int = 1) -> Num[Array, "W *rest"]:
    """x by device that it is for, returned by device that it is from.

    With a `node` of so many devices, which lie side by side, first within nodes, then between them.
    """
    devices = x.shape[0]
    if node in (1, devices):
        return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
    nodes, shape = devices // node, x.shape
    x = x.reshape(nodes, node, *shape[1:])
    within = [[n * node + i for i in range(node)] for n in range(nodes)]
    between = [[n * node + i for n in range(nodes)] for i in range(node)]
    x = jax.lax.all_to_all(x, axes, 1, 1, axis_index_groups=within, tiled=True)
    x = jax.lax.all_to_all(x, axes, 0, 0, axis_index_groups=between, tiled=True)
    return x.reshape(shape)


def rows(
    axes: Axes,
    x: Num[Array, "W R D"],
    leaving: Int[Array, "W"],
    coming: Int[Array, "W"],
    node: int = 1,
) -> Num[Array, "W R D"]:
    """`all_to_all` of which the first `leaving` rows for a device and `coming` from one count.

    Nothing else travels where XLA can do without (`RAGGED`, and not by nodes); it is zero there,
    and whatever was sent elsewhere.
    """
    if target().platform in RAGGED and node in (1, x.shape[0]):
        return _ragged(axes, x, leaving, coming)
    return all_to_all(axes, x, node)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(axes, x, leaving, coming):
    (devices, room), flat = x.shape[:2], x.reshape(-1, *x.shape[2:])
    begins = jnp.arange(devices, dtype=jnp.int32) * room
    # on every device there is room for this one's rows at the same place
    there = jnp.full((devices,), jax.lax.axis_index(axes) * room, jnp.int32)
    y = jax.lax.ragged_all_to_all(
        flat, jnp.zeros_like(flat), begins, leaving, there, coming, axis_name=axes
    )
    return y.reshape(x.shape)


def _ragged_forward(axes, x, leaving, coming):
    return _ragged(axes, x, leaving, coming), (leaving, coming)


def _ragged_backward(axes, kept, g):
    leaving, coming = kept
    return _ragged(axes, g, coming, leaving), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)
