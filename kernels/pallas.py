"""What the Pallas kernels share: who may run them, how they are called, and products on tiles.

Kernels see shapes that fit them: whoever calls them pads. They run compiled, or interpreted where
the target says so (`dispatch.on`); with x64 on they are traced without it, for Mosaic has no 64-bit
integers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .dispatch import Target, target

HOPPER = "9.0"


def no_tpu(*arrays: Any) -> str | None:
    """Why a kernel for TPUs does not take these arrays here, or None."""
    here = target()
    if here.platform != "tpu":
        return f"it runs on TPUs, and this is {describe(here)}"
    return empty(arrays) or wrong_dtype(arrays, (jnp.float32, jnp.bfloat16))


def no_hopper(*arrays: Any) -> str | None:
    """Why a kernel for Hopper GPUs does not take these arrays here, or None."""
    here = target()
    if here.platform != "gpu" or here.capability != HOPPER:
        return f"it runs on Hopper GPUs (H100, H200), and this is {describe(here)}"
    return empty(arrays) or wrong_dtype(arrays, (jnp.bfloat16,))


def describe(device: Target) -> str:
    """A device in an error's words."""
    return device.kind or device.platform


def empty(arrays: Sequence[Any]) -> str | None:
    """Why an array without elements will not do, or None: a grid has at least one step."""
    for array in arrays:
        if 0 in array.shape:
            return f"it takes no empty arrays, as one of shape {array.shape}"
    return None


def wrong_dtype(arrays: Sequence[Any], allowed: Sequence[Any]) -> str | None:
    """Why the dtype of one of these arrays will not do, or None."""
    for array in arrays:
        if array.dtype not in allowed:
            names = " or ".join(jnp.dtype(dtype).name for dtype in allowed)
            return f"it takes {names}, not {array.dtype}"
    return None


def tpu_call(kernel, device: Target, *, semantics: Any, vmem: int | None = None, **how):
    """`pl.pallas_call` for the TPU; `semantics` of each grid axis, "parallel" or "arbitrary"."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem)
    call = pl.pallas_call(kernel, compiler_params=parameters, interpret=device.interpret, **how)

    def run(*args):
        with jax.enable_x64(False):
            return call(*args)

    return run


class Blocks:
    """Which part of an array a step (row, head, n-th chunk) of a grid over chunks works on."""

    def __init__(self, size: int, grid: tuple[int, int, int], reverse: bool = False):
        self.size, self.grid, self.reverse = size, grid, reverse

    def __call__(self, x):
        """Of tokens (B, G, T, K), or of what there is one of a chunk, (B, G, N, ...).

        G divides the heads; B may be 1 for all rows.
        """
        from jax.experimental import pallas as pl

        batch, heads, chunks = self.grid
        shared, ratio = x.shape[0] < batch, heads // x.shape[1]

        def place(b, h, n):
            n = chunks - 1 - n if self.reverse else n
            group = jax.lax.div(h, np.int32(ratio))  # `//` would lower a sign, which asks which TPU
            return (0 if shared else b, group, n) + (0,) * (x.ndim - 3)

        if x.ndim == 4:
            return pl.BlockSpec((None, None, self.size, x.shape[3]), place)
        return pl.BlockSpec((None, None, None, *x.shape[3:]), place)

    def state(self, x):
        """Of a state (B, H, ...): the same for every chunk."""
        from jax.experimental import pallas as pl

        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0))


def shape(*sizes: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """Of an output."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def over_chunks(device: Target, kernel, grid, inputs, outputs, scratch):
    """Call a kernel for TPUs over (rows, heads or channels, chunks in order), its state in VMEM.

    `inputs` and `outputs` are pairs of array -> BlockSpec and an array or a shape; `scratch` the
    shapes of the float32 arrays that stay from chunk to chunk.
    """
    from jax.experimental.pallas import tpu as pltpu

    call = tpu_call(
        kernel,
        device,
        semantics=("parallel", "parallel", "arbitrary"),
        grid=grid,
        in_specs=[spec(x) for spec, x in inputs],
        out_specs=[spec(x) for spec, x in outputs],
        out_shape=[x for _, x in outputs],
        scratch_shapes=[pltpu.VMEM(sizes, jnp.float32) for sizes in scratch],
    )
    return call(*(x for _, x in inputs))


def collect(gradient, like: tuple[int, int]):
    """Sum a gradient (B, H, ...) over what was shared: to leading axes (B or 1, groups)."""
    batch, heads, *rest = gradient.shape
    d = gradient.reshape(batch, like[1], heads // like[1], *rest).sum(axis=2)
    return d if like[0] == d.shape[0] else d.sum(axis=0, keepdims=True)


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


def rounded(weights, exact: bool):
    """Weights as a product will read them, so that their sum is the sum of what it reads."""
    return weights if exact else weights.astype(jnp.bfloat16).astype(jnp.float32)


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
