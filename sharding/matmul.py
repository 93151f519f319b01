"""Collective matmul: a product over the axis tensor whose exchange goes on while it computes.

With the schedule's `matmul` = ring the residual stream lies over tensor too, by time (Megatron-LM's
sequence parallelism, arXiv:2205.05198). A product by columns needs the whole span, one by rows
leaves sums of all devices; both go round the ring of devices in blocks of time, and each block's
product is independent of the exchange that goes on beside it (arXiv:2211.05102, section 3.5). The
backward pass of one is the other. Sums are made, and travel, in at least float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ..kernels import keep
from . import mesh, schedule
from .sequence import HEADS, manual

AXIS = "tensor"
BLOCKS = P(mesh.ROWS, ("seq", AXIS))  # (B, T, D), the residual stream


def rings(x: Float[Array, "..."]) -> bool:
    """Whether products of x (B, T, D) go round the ring; one token cannot be shared out."""
    asked = schedule.in_force().matmul == "ring" and mesh.size(AXIS) > 1
    return asked and x.ndim == 3 and x.shape[1] > 1


def stream(x: Float[Array, "B T *S D"]) -> Any:
    """The axes that the time of the residual stream lies over. ValueError if it does not divide."""
    if not rings(x):
        return mesh.over_time(x.shape[1])
    mesh.divide("length", x.shape[1], "seq", AXIS)
    return "seq", AXIS


def by_columns(
    x: Float[Array, "B T D"], kernels: Sequence[Float[Array, "D _"]]
) -> tuple[Float[Array, "B T D"], list[Array]]:
    """(x whole, x @ kernel of each, by columns): one exchange for all."""
    columns, found = [P(None, AXIS)] * len(kernels), [HEADS] * len(kernels)
    outputs = P(mesh.ROWS, "seq"), found
    return manual(_columns, (BLOCKS, columns), outputs)(x, list(kernels))


def by_rows(x: Float[Array, "B T F"], kernel: Float[Array, "F D"]) -> Float[Array, "B T D"]:
    """x @ kernel, summed over the devices' features, in at least float32."""
    return manual(_rows, (HEADS, P(AXIS)), BLOCKS)(x, kernel)


@jax.custom_vjp
def _columns(x, kernels):
    return _columns_forward(x, kernels)[0]


def _columns_forward(x, kernels):
    whole, found = gathered(x, kernels)
    return (whole, found), (whole, kernels)


def _columns_backward(residuals, cotangents):
    (whole, kernels), (to_whole, to_found) = residuals, cotangents

    def part(first, span):
        sums = cut(to_whole, first, span).astype(product_type(whole))
        for kernel, to in zip(kernels, to_found, strict=True):
            sums += product(cut(to, first, span), kernel.T)
        return sums

    to_kernels = [outer(whole, to).astype(k.dtype) for k, to in zip(kernels, to_found, strict=True)]
    return scattered(part, whole.shape[1]).astype(whole.dtype), to_kernels


_columns.defvjp(keep.rule(_columns_forward), _columns_backward)


@jax.custom_vjp
def _rows(x, kernel):
    return _rows_forward(x, kernel)[0]


def _rows_forward(x, kernel):
    total = scattered(lambda first, span: product(cut(x, first, span), kernel), x.shape[1])
    return total, (x, kernel)


def _rows_backward(residuals, cotangent):
    x, kernel = residuals
    whole, (to_x,) = gathered(cotangent.astype(x.dtype), [kernel.T])
    return to_x, outer(x, whole).astype(kernel.dtype)


_rows.defvjp(keep.rule(_rows_forward), _rows_backward)


def gathered(x: Array, kernels: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Inside shard_map: all devices' x by time, and its products, block by block as they arrive."""
    devices, here, onward = ring()
    span = x.shape[1]
    shape = x.shape[0], span * devices
    whole = jnp.zeros((*shape, x.shape[2]), x.dtype)
    found = [jnp.zeros((*shape, kernel.shape[1]), x.dtype) for kernel in kernels]
    for i in range(devices):
        following = jax.lax.ppermute(x, AXIS, onward) if i + 1 < devices else x
        first = (here - i) % devices * span
        whole = jax.lax.dynamic_update_slice_in_dim(whole, x, first, 1)
        for j, kernel in enumerate(kernels):
            y = product(x, kernel).astype(x.dtype)
            found[j] = jax.lax.dynamic_update_slice_in_dim(found[j], y, first, 1)
        x = following
    return whole, found


def scattered(part: Callable[[Any, int], Array], time: int) -> Array:
    """Inside shard_map: this device's block of the sum of all devices' part(first, span)."""
    devices, here, onward = ring()
    span, total = time // devices, None
    for i in range(devices):  # what has been round the ring is this device's own block
        y = part((here - 1 - i) % devices * span, span)
        total = y if total is None else jax.lax.ppermute(total, AXIS, onward) + y
    assert total is not None
    return total


def ring() -> tuple[int, Array, list[tuple[int, int]]]:
    """How many devices there are, which this is, and who sends to whom."""
    devices = jax.lax.axis_size(AXIS)
    return devices, jax.lax.axis_index(AXIS), [(i, (i + 1) % devices) for i in range(devices)]


def cut(x: Array, first: Any, span: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, span, 1)


def product_type(x: Array) -> Any:
    return jnp.promote_types(jnp.float32, x.dtype)


def product(x: Array, kernel: Array) -> Array:
    """x @ kernel in at least float32."""
    kinds: Any = {"precision": "highest", "preferred_element_type": product_type(x)}
    return jnp.matmul(x, kernel, **kinds)


def outer(x: Array, y: Array) -> Array:
    """sum over rows and time of x y^T: a kernel's gradient."""
    kinds: Any = {"precision": "highest", "preferred_element_type": product_type(x)}
    return jnp.einsum("btd,btf->df", x, y, **kinds)
