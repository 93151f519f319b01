"""Collective matmul: a product over the axis tensor whose exchange goes on while it computes.

With the schedule's `matmul` = ring the residual stream lies over tensor too, by time (Megatron-LM's
sequence parallelism, arXiv:2205.05198). A product by columns needs the whole span, one by rows
leaves sums of all devices; both go round the ring of devices in blocks of time, and each block's
product is independent of the exchange that goes on beside it (arXiv:2211.05102, section 3.5). The
backward pass of one is the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from . import mesh, schedule
from .sequence import HEADS, manual

BLOCKS = P(mesh.ROWS, ("seq", "tensor"))  # (B, T, D), the residual stream


def rings(x: Float[Array, "..."]) -> bool:
    """Whether products of x (B, T, D) go round the ring; one token cannot be shared out."""
    asked = schedule.in_force().matmul == "ring" and mesh.size("tensor") > 1
    return asked and x.ndim == 3 and x.shape[1] > 1


def stream(x: Float[Array, "B T D"]) -> Any:
    """The axes that the time of the residual stream lies over. ValueError if it does not divide."""
    if not rings(x):
        return mesh.over_time(x.shape[1])
    mesh.divide("length", x.shape[1], "seq", "tensor")
    return "seq", "tensor"


def by_columns(
    product: Callable, x: Float[Array, "B T D"], kernels: Sequence[Float[Array, "D _"]]
) -> tuple[Float[Array, "B T D"], list[Array]]:
    """(x whole, product(x, kernel) of each, by columns): one exchange for all."""

    def local(x, kernels):
        devices, here = jax.lax.axis_size("tensor"), jax.lax.axis_index("tensor")
        span, onward = x.shape[1], [(i, (i + 1) % devices) for i in range(devices)]
        shape = x.shape[0], span * devices
        whole = jnp.zeros((*shape, x.shape[2]), x.dtype)
        found = [jnp.zeros((*shape, kernel.shape[1]), x.dtype) for kernel in kernels]
        for i in range(devices):
            following = jax.lax.ppermute(x, "tensor", onward) if i + 1 < devices else x
            first = (here - i) % devices * span
            whole = jax.lax.dynamic_update_slice_in_dim(whole, x, first, 1)
            for j, kernel in enumerate(kernels):
                y = product(x, kernel).astype(x.dtype)
                found[j] = jax.lax.dynamic_update_slice_in_dim(found[j], y, first, 1)
            x = following
        return whole, found

    specs = [HEADS] * len(kernels)
    columns = [P(None, "tensor")] * len(kernels)
    return manual(local, (BLOCKS, columns), (P(mesh.ROWS, "seq"), specs))(x, list(kernels))


def by_rows(
    product: Callable, x: Float[Array, "B T F"], kernel: Float[Array, "F D"]
) -> Float[Array, "B T D"]:
    """product(x, kernel), summed over the devices' features in at least float32."""
    exact = jnp.promote_types(jnp.float32, x.dtype)

    def local(x, kernel):
        devices, here = jax.lax.axis_size("tensor"), jax.lax.axis_index("tensor")
        span, onward = x.shape[1] // devices, [(i, (i + 1) % devices) for i in range(devices)]
        total = None
        for i in range(devices):  # what has been round the ring is this device's own block
            first = (here - 1 - i) % devices * span
            y = product(jax.lax.dynamic_slice_in_dim(x, first, span, 1), kernel).astype(exact)
            total = y if total is None else jax.lax.ppermute(total, "tensor", onward) + y
        return total

    return manual(local, (HEADS, P("tensor")), BLOCKS)(x, kernel)
