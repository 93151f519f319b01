"""What the kernels for Hopper GPUs share: a warpgroup's tiles, and products by its tensor cores.

A warpgroup keeps a matrix in registers as its tensor cores leave it (the layout WGMMA), and numbers
of each row or column spread alongside. The interpreter knows neither layouts nor transposed tiles:
for it they are plain arrays. This module imports Mosaic GPU; whoever dispatches imports it late.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from . import pallas
from .dispatch import Target

ACC: Any = gpu.ACC  # pyright: ignore[reportPrivateImportUsage]
TILE = 64  # rows of a tensor core product, and the bfloat16 of a swizzled line of shared memory


def call(kernel, device: Target, *, infer: bool = False, **how):
    """`gpu.kernel` compiled, or interpreted where the target says so.

    A kernel that names its layouts is lowered as it says; `infer` finds them, and exponentials are
    then the hardware's, of 2 units in the last place.
    """
    semantics = gpu.LoweringSemantics.Warpgroup if infer else gpu.LoweringSemantics.Lane
    parameters = gpu.CompilerParams(lowering_semantics=semantics, approx_math=infer)
    launch = gpu.kernel(kernel, interpret=device.interpret, compiler_params=parameters, **how)

    def run(*args):
        with jax.enable_x64(False):
            return launch(*args)

    return run


def load(ref, layout):
    """Global memory to registers; before JAX 0.11 with an index of its own."""
    index = inspect.signature(gpu.load).parameters.get("idx")
    needed = index is not None and index.default is inspect.Parameter.empty
    return gpu.load(ref, *([()] if needed else []), layout=layout, optimized=False)


def tiles(*shape, line=TILE):
    """Shared memory for bfloat16 that the tensor cores read; the last two axes are the matrix.

    A product sums over a multiple of `line` of its rows or columns.
    """
    swizzled = gpu.TilingTransform((8, line)), gpu.SwizzleTransform(2 * line)
    return gpu.SMEM(shape, jnp.bfloat16, transforms=swizzled)


class Warpgroup:
    """A kernel's thread, which is a warpgroup: what it loads into registers and multiplies."""

    def __init__(self, device: Target):
        self.interpreted = bool(device.interpret)

    def _load(self, ref, layout):
        return ref[...] if self.interpreted else gpu.layout_cast(ref[...], layout)

    def tile(self, ref):
        """A matrix in shared memory, as float32."""
        return self._load(ref, gpu.Layout.WGMMA).astype(jnp.float32)

    def from_global(self, ref, layout: Any = gpu.Layout.WGMMA):
        """A matrix in global memory, or of another layout."""
        if self.interpreted:
            return ref[...]
        return load(ref, layout)

    def down(self, ref, width=TILE):
        """Numbers of the rows, in shared memory, as a matrix of equal columns."""
        x = self._load(ref, gpu.Layout.WGMMA.reduce(1))
        return jax.lax.broadcast_in_dim(x, (*x.shape, width), (0,))

    def across(self, ref, height=TILE):
        """Numbers of the columns as a matrix of equal rows."""
        x = self._load(ref, gpu.Layout.WGMMA.reduce(0))
        return jax.lax.broadcast_in_dim(x, (height, *x.shape), (1,))

    def index(self, shape, axis):
        """The number of each element along `axis`, int32."""
        if self.interpreted:
            return pallas.index(shape, axis)
        return gpu.broadcasted_iota(jnp.int32, shape, axis, layout=gpu.Layout.WGMMA)

    def dot(self, dims, x, y):
        """A product in float32 of two matrices in shared memory; `dims` as "ik,jk->ij"."""
        if self.interpreted:
            return pallas.dot(x[...], y[...], dims, exact=False)
        left, right, out = dims.replace("->", ",").split(",")
        x = x if left[0] == out[0] else x.transpose((1, 0))
        y = y if right[1] == out[1] else y.transpose((1, 0))

        def multiply(total):
            gpu.wgmma(total, x, y)
            return total[...]

        return pl.run_scoped(multiply, ACC((x.shape[0], y.shape[1]), jnp.float32))
