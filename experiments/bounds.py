"""The least time that an operation can take on a device: its bytes, or its arithmetic."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from . import timing

T = TypeVar("T")
PRODUCT = 2 * 1024**3  # operations of a product whose rate counts as the device's


class Device(NamedTuple):
    """What a device does in a second."""

    flops: float
    """Operations on matrices of bfloat16, dense; a multiply-add is two."""
    memory: float
    """Bytes read or written."""


# as their makers publish them
DEVICES = {
    "TPU v4": Device(275e12, 1.228e12),
    "TPU v5 lite": Device(197e12, 8.19e11),
    "TPU v5": Device(459e12, 2.765e12),
    "TPU v6 lite": Device(918e12, 1.64e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, 3.35e12),  # SXM
    "NVIDIA H100 NVL": Device(835e12, 3.9e12),
    "NVIDIA H100 PCIe": Device(756e12, 2.0e12),
    "NVIDIA H200": Device(989e12, 4.8e12),
}


def of_kind(table: dict[str, T], kind: str) -> T | None:
    """A table's entry of a kind of device, as JAX names it; None if it has none."""
    names = sorted((name for name in table if kind.startswith(name)), key=len)  # v5, v5 lite
    return table[names[-1]] if names else None


def here() -> tuple[Device, str]:
    """JAX's first device, and whose figures these are: published, or else measured now."""
    kind = jax.devices()[0].device_kind
    known = of_kind(DEVICES, kind)
    return (known, "published") if known else (measured(), "measured, float32")


def measured() -> Device:
    """The rate of one large product of float32 matrices, and of reading and writing an array.

    Arrays that stay in a CPU's cache can be quicker than that.
    """
    y, multiply = jnp.ones(1 << 25, jnp.float32), product()
    seconds = min(multiply() for _ in range(10))
    stream = jax.jit(lambda y: y + 1, donate_argnums=0)  # into memory that there is already
    spent = []
    for _ in range(11):
        begun = time.perf_counter()
        y = jax.block_until_ready(stream(y))
        spent.append(time.perf_counter() - begun)
    return Device(PRODUCT / seconds, 2 * y.nbytes / min(spent[1:]))


def product() -> Callable[[], float]:
    """What says the seconds of a product of PRODUCT operations."""
    x = jnp.ones((1024, 1024), jnp.float32)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    return lambda: timing.seconds(lambda: multiply(x))


def reading(size: float) -> Callable[[], float]:
    """What says the seconds of reading `size` bytes again and again, of a matrix's product with a
    vector: from a cache, where they stay in one."""
    w, x = jnp.ones((math.ceil(size / 4096), 1024), jnp.float32), jnp.ones(1024, jnp.float32)
    multiply = jax.jit(lambda w, x: w @ x)
    return lambda: timing.seconds(lambda: multiply(w, x))


def least(device: Device, flops: int, arguments: Any, outputs: Any) -> tuple[float, float]:
    """Seconds of a forward pass of `flops` operations, and of it with the backward pass.

    Forward reads the inputs once and writes the outputs once; backward reads the inputs and the
    outputs' cotangents, writes the gradients to the float inputs, and does twice the arithmetic:
    each product has a gradient to both its sides.
    """
    inputs, written = _bytes(arguments), _bytes(outputs)
    floats = [x for x in jax.tree.leaves(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]
    forward = inputs + written
    whole = forward + inputs + written + _bytes(floats)
    return (
        max(forward / device.memory, flops / device.flops),
        max(whole / device.memory, 3 * flops / device.flops),
    )


def _bytes(arrays: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
