"""The grouped matmul by JAX's Pallas kernels for TPUs, padded to whole tiles of rows.

Of jax.experimental.pallas.ops.tpu.megablox only the two kernels are used: its own derivative keeps
a bfloat16 gradient to w in bfloat16. Sums are in float32.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp

from .. import dispatch, pallas
from .gradient import differentiable

ROWS, COLUMNS = 128, 512  # of a tile; not tuned


def refuse(x, w, sizes, transpose):
    """Why not, or None: the kernels are for TPUs and for two dtypes."""
    del w, sizes, transpose
    return pallas.no_tpu(x)


def grouped_matmul(x, w, sizes, transpose):
    """The public function's arguments after its checks."""
    return make(bool(dispatch.target().interpret))(x, w, sizes, transpose)


def kernels():
    """(gmm, tgmm), imported where they are used: the import is slow and drags Pallas along."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def tiles(*widths):
    """Of rows and of each width: a whole width, or pieces of which the last may be shorter."""
    return ROWS, *(min(width, COLUMNS) for width in widths)


def whole_tiles(x):
    """x with rows of zeros to whole tiles."""
    return jnp.pad(x, [(0, -x.shape[0] % ROWS), (0, 0)])


@contextlib.contextmanager
def exactly(dtype):
    """The kernels name neither a precision nor their integers' widths."""
    precision = "highest" if dtype == jnp.float32 else "default"
    with jax.enable_x64(False), jax.default_matmul_precision(precision):
        yield


@functools.cache
def make(interpret):
    """The kernels with their gradients, compiled or through Pallas' interpreter."""

    def product(x, w, sizes, transpose):
        gmm, _ = kernels()
        rows, width = x.shape[0], w.shape[1 if transpose else 2]
        with exactly(x.dtype):
            y = gmm(
                *(whole_tiles(x), w.astype(x.dtype), sizes, x.dtype),
                tiling=tiles(x.shape[1], width),
                transpose_rhs=transpose,
                interpret=interpret,
            )[:rows]
        row = jnp.arange(rows, dtype=jnp.int32)  # the kernel leaves the rest as it finds it
        return jnp.where((row < sizes.sum(dtype=jnp.int32))[:, None], y, 0)

    def outer(x, dy, sizes, dtype):
        _, tgmm = kernels()
        with exactly(x.dtype):
            return tgmm(
                *(whole_tiles(x).T, whole_tiles(dy), sizes, dtype),
                tiling=tiles(x.shape[1], dy.shape[1]),
                interpret=interpret,
            )

    return differentiable(product, outer)
