"""What the Pallas kernels share: who may run them, how they are called, and products on tiles.

Kernels see shapes that fit them: whoever calls them pads. They run compiled, or interpreted where
the target says so (`dispatch.on`); with x64 on they are traced without it, for Mosaic has no 64-bit
integers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .dispatch import Target, target

HOPPER = "9.0"


def no_tpu(*arrays: Any) -> str | None:
    """Why a kernel for TPUs does not take these arrays here, or None."""
    here = target()
    if here.platform != "tpu":
        return f"it runs on TPUs, and this is {describe(here)}"
    return wrong_dtype(arrays, (jnp.float32, jnp.bfloat16))


def no_hopper(*arrays: Any) -> str | None:
    """Why a kernel for Hopper GPUs does not take these arrays here, or None."""
    here = target()
    if here.platform != "gpu" or here.capability != HOPPER:
        return f"it runs on Hopper GPUs (H100, H200), and this is {describe(here)}"
    return wrong_dtype(arrays, (jnp.bfloat16,))


def describe(device: Target) -> str:
    """A device in an error's words."""
    return device.platform if device.kind in ("", device.platform) else f"a {device.kind}"


def wrong_dtype(arrays: Sequence[Any], allowed: Sequence[Any]) -> str | None:
    """Why these arrays' common dtype will not do, or None."""
    dtype = jnp.result_type(*arrays)
    if dtype in allowed:
        return None
    return f"it takes {' or '.join(jnp.dtype(d).name for d in allowed)}, not {dtype}"


def tpu_call(kernel, device: Target, *, semantics: Sequence[str], vmem: int | None = None, **how):
    """`pl.pallas_call` for the TPU; `semantics` of each grid axis, "parallel" or "arbitrary"."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.CompilerParams(
        dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem
    )
    call = pl.pallas_call(
        kernel, compiler_params=parameters, interpret=device.interpret, **how
    )

    def run(*args):
        with jax.enable_x64(False):
            return call(*args)

    return run


def dot(x, y, dims: str, exact: bool):
    """A product of two matrices summed in float32; `dims` names the axes, as "ck,vk->cv".

    `exact` multiplies in float32; else both are rounded to bfloat16 for the matrix unit.
    """
    left, right = dims.split("->")[0].split(",")
    (shared,) = set(left) & set(right)
    contract = ((left.index(shared),), (right.index(shared),)), ((), ())
    if not exact:
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(
        x,
        y,
        contract,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def column(row):
    """(1, C) -> (C, 1): what is masked away may be anything, nan too."""
    size = row.shape[1]
    return jnp.sum(jnp.where(diagonal(size), row, jnp.zeros((), row.dtype)), axis=1, keepdims=True)


def row(column):
    """(C, 1) -> (1, C)."""
    size = column.shape[0]
    zero = jnp.zeros((), column.dtype)
    return jnp.sum(jnp.where(diagonal(size), column, zero), axis=0, keepdims=True)


def index(shape, axis):
    """The number of each element along `axis`, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def diagonal(size):
    """True where row and column are equal."""
    return index((size, size), 0) == index((size, size), 1)
