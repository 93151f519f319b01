"""The projection that every layer uses: nnx.Linear, exact in float32, fast on a CPU."""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..kernels.keep import keep
from ..sharding import matmul, mesh

# XLA of jax 0.10 fuses what makes x into a copy of it, and so computes all of that once more
RECOMPUTES = jax.__version_info__ < (0, 11)


def product(
    x: Float[Array, "*R K"], kernel: Float[Array, "K N"], dimension_numbers, **options
) -> Float[Array, "*R N"]:
    """x @ kernel by `jax.lax.dot_general`, whose gradient of the kernel is quick on a CPU too.

    XLA lays x out anew, features first, for a sum over two axes of rows, batch and time. JAX's own
    gradient would lay the cotangent out anew and turn the result; and of one axis of rows XLA reads
    columns as they lie, which is slow where features are a power of two. 4 x 512 rows, K=256,
    N=1024, on one core: 13 ms; JAX's own 41; of one axis, as in a batch of one row, 24. With jax
    0.10 all rows are made one axis, the quickest in a model there, and the gradient is JAX's own.
    Forward mode (`jax.jvp`) works with jax 0.10 alone.
    """
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} features; the projection takes {kernel.shape[0]}")
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    given = tuple(options.items())
    if not RECOMPUTES:
        return keep(_product(given, x, kernel))
    # over the sequence's devices one axis cannot hold the rows' devices and the time's
    rows = x if mesh.size("seq") > 1 else x.reshape(-1, x.shape[-1])
    return keep(_multiplied(given, rows, kernel).reshape(*x.shape[:-1], kernel.shape[1]))


def _multiplied(options, x, kernel):
    return _contracted(options, x, kernel, (x.ndim - 1,), (0,))


_product = jax.custom_vjp(_multiplied, nondiff_argnums=(0,))


def _forward(options, x, kernel):
    return _multiplied(options, x, kernel), (x, kernel)


def _backward(options, residuals, ct):
    x, kernel = residuals
    options = tuple((name, value) for name, value in options if name != "out_sharding")  # y's own
    rows = tuple(range(x.ndim - 1))
    dx = _contracted(options, ct, kernel, (x.ndim - 1,), (1,))
    d_kernel = _contracted(options, x, ct, rows, rows)
    return dx.astype(x.dtype), d_kernel.astype(kernel.dtype)


_product.defvjp(_forward, _backward)


def _contracted(options, a, b, axes_a, axes_b):
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), **dict(options))


# float32 inputs mean float32 products on every backend, whatever its default is.
Linear = partial(nnx.Linear, precision="highest", dot_general=product)


def columns(x: Float[Array, "... D"], *linears: nnx.Linear) -> list[Array]:
    """[x, linear(x), ...]: projections into heads or hidden features, with one exchange for all."""
    if not matmul.rings(x):
        return [x, *(linear(x) for linear in linears)]
    kernels = [linear.kernel[...].astype(linear.dtype) for linear in linears]
    x, found = matmul.by_columns(x.astype(linears[0].dtype), kernels)
    return [x, *(_biased(linear, y) for linear, y in zip(linears, found, strict=True))]


def rows(linear: nnx.Linear, y: Float[Array, "... F"]) -> Float[Array, "... D"]:
    """linear(y): the projection back into the residual stream."""
    if not matmul.rings(y):
        return linear(y)
    y = matmul.by_rows(y.astype(linear.dtype), linear.kernel[...].astype(linear.dtype))
    return _biased(linear, y.astype(linear.dtype))


def _biased(linear, y):
    return y if linear.bias is None else y + linear.bias[...].astype(y.dtype)
