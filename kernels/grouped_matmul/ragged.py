"""The grouped matmul by JAX's own ragged dots, with rows past the groups masked on all sides.

Their own derivative would sum the gradient to a bfloat16 w in bfloat16, so it is written out.
XLA for CPUs makes a dense product over all groups of them: E times the work.
"""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from .gradient import differentiable


def grouped(x, sizes):
    """x with zeros past the groups, whatever stands there."""
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.where((row < sizes.sum(dtype=jnp.int32))[:, None], x, 0)


def dot(a, b, sizes, contracted, groups):
    numbers = RaggedDotDimensionNumbers((contracted, ((), ())), [0], groups)
    exact = jnp.promote_types(jnp.float32, a.dtype)
    precision = "highest" if a.dtype == exact else "default"  # TPUs refuse the first for bfloat16
    return jax.lax.ragged_dot_general(
        *(a, b, sizes, numbers), precision=precision, preferred_element_type=exact
    )


def product(x, w, sizes, transpose):
    contracted = ((1,), (2 if transpose else 1,))
    y = dot(grouped(x, sizes), w.astype(x.dtype), sizes, contracted, [0])
    return grouped(y, sizes).astype(x.dtype)


def outer(x, dy, sizes, dtype):
    return dot(grouped(x, sizes), grouped(dy, sizes), sizes, ((0,), (0,)), []).astype(dtype)


grouped_matmul = differentiable(product, outer)
