"""Grouped matmul, of a mixture of experts that drops no row: y_i = x_i w_e for row i of group e."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks
from ..dispatch import Implementation, call, target
from . import megablox, ragged, reference, xla

IMPLEMENTATIONS = {
    "megablox": Implementation(megablox.grouped_matmul, megablox.refuse),
    "xla": Implementation(xla.grouped_matmul),
    "ragged": Implementation(ragged.grouped_matmul),
    "reference": Implementation(reference.grouped_matmul),
}
FIRST = {"gpu": "ragged", "tpu": "megablox"}


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E _ _"],
    sizes: Int[Array, "E"],
    *,
    transpose: bool = False,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y_i = x_i w_e, or x_i w_e^T with `transpose`, for row i of x in group e.

    Experts that drop no token, as in MegaBlocks (arXiv:2211.15841). Rows lie group after group:
    `sizes[0]` rows of group 0, `sizes[1]` of group 1, and so on; any size may be 0. w is (E, K, N),
    or (E, N, K) with `transpose`. The sizes sum to M at most, which is not checked: they are data.
    Rows past their sum are zero in y and in the gradient to x, and nothing of them reaches the
    gradient to w, not even a nan.

    w is cast to the dtype of x where it is used. Sums are in at least float32, y and the gradient
    to x in the dtype of x, the gradient to w in that of w. Raises ValueError for shapes that do
    not fit, NotImplementedError for an implementation that does not take the call.
    """
    check(x, w, sizes, transpose)
    arguments = x, w, sizes.astype(jnp.int32), transpose
    first = FIRST.get(target().platform, "xla")
    ordered = {first: IMPLEMENTATIONS[first]} | IMPLEMENTATIONS
    return call("grouped_matmul", ordered, implementation, *arguments)


def check(x, w, sizes, transpose):
    """Raise a ValueError that names the first shape that does not fit."""
    if x.ndim != 2 or w.ndim != 3 or sizes.ndim != 1:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and sizes {sizes.shape} are not (M, K), (E, _, _), (E,)"
        )
    checks.floats(x=(x, (2,)), w=(w, (3,)))
    if sizes.dtype.kind not in "iu":
        raise ValueError(f"sizes is {sizes.dtype}; it must be whole numbers, as int32")
    if x.shape[0] == 0 or w.shape[0] == 0:
        raise ValueError(f"x {x.shape} and w {w.shape}: at least one row and one group are needed")
    if sizes.shape[0] != w.shape[0]:
        raise ValueError(f"{sizes.shape[0]} sizes for the {w.shape[0]} groups of w {w.shape}")
    width = w.shape[2 if transpose else 1]
    if x.shape[1] != width:
        raise ValueError(
            f"x {x.shape} has {x.shape[1]} features and w {w.shape} takes {width} ({transpose=})"
        )
