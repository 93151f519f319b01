"""The gradients of y = x w, two more grouped products: dx = dy w^T, dw_e = x_e^T dy_e."""

from collections.abc import Callable

import jax

from .. import keep


def differentiable(product: Callable, outer: Callable) -> Callable:
    """grouped_matmul(x, w, sizes, transpose) with first-order reverse mode.

    `product` has that signature and `outer(x, dy, sizes, dtype)` gives every group's x_e^T dy_e.
    """

    def forward(x, w, sizes, transpose):
        return product(x, w, sizes, transpose), (x, w, sizes)

    def backward(transpose, residuals, dy):
        x, w, sizes = residuals
        dx = product(dy, w, sizes, not transpose)
        pair = (dy, x) if transpose else (x, dy)
        return dx, outer(*pair, sizes, w.dtype), None

    run = jax.custom_vjp(product, nondiff_argnums=(3,))
    run.defvjp(keep.rule(forward), backward)
    return run
