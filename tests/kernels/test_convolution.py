"""The convolution of frames: its sum written out, its gradients, in loops and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels.convolution import convolve
from support.compare import close


def written_out(x, kernel):
    """The sum of the docstring in float64, one tap after another."""
    rows, columns = kernel.shape[:2]
    above, left = (rows - 1) // 2, (columns - 1) // 2
    around = [(above, rows - 1 - above), (left, columns - 1 - left)]
    padded = np.pad(x.astype(np.float64), [(0, 0)] * (x.ndim - 3) + around + [(0, 0)])
    (height, width), y = x.shape[-3:-1], 0
    for j in range(rows):
        for k in range(columns):
            y = y + padded[..., j : j + height, k : k + width, :] @ kernel[j, k].astype(np.float64)
    return y


@pytest.mark.parametrize("size", [(3, 3), (1, 1), (5, 3), (2, 4)])
def test_it_is_its_sum_and_so_are_its_gradients(size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 7, 2), np.float32)
    kernel = rng.standard_normal((*size, 2, 3), np.float32)
    ct = rng.standard_normal((2, 3, 5, 7, 3), np.float32)
    y, pull = jax.vjp(convolve, jnp.asarray(x), jnp.asarray(kernel))
    close(y, written_out(x, kernel), 1e-5)
    dx, dkernel = pull(jnp.asarray(ct))
    # the sum is linear in each: <ct, y(e)> of unit vectors e
    for of, gradient in ((0, dx), (1, dkernel)):
        value = (x, kernel)[of]
        units = np.eye(value.size).reshape(value.size, *value.shape)
        with_units = (
            written_out(units, kernel) if of == 0 else np.stack([written_out(x, u) for u in units])
        )
        true = (with_units * ct).reshape(value.size, -1).sum(1).reshape(value.shape)
        close(gradient, true, 1e-5)


def test_a_loop_changes_nothing():
    """What the gradients are written out for: layers and steps of time that are scanned."""
    kernels = jax.random.normal(jax.random.key(0), (3, 3, 3, 4, 4), jnp.float32) / 6
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 4), jnp.float32)

    def scanned(kernels, x):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(convolve(x, kernel)), None), x, kernels)[0]

    def plain(kernels, x):
        for kernel in kernels:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.tanh(y)
        return x

    both = [jax.jit(jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1))) for f in (scanned, plain)]
    close(both[0](kernels, x), both[1](kernels, x), 1e-5)


def test_dtypes_are_those_of_the_frames():
    x, kernel = jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 1), jnp.float32)
    y, pull = jax.vjp(convolve, x, kernel)
    assert y.dtype == jnp.bfloat16
    assert [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32]
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (1, 3, 3, 2), jnp.float64)
        y = convolve(x, kernel)
        assert y.dtype == jnp.float64
        close(y, written_out(np.asarray(x), np.asarray(kernel)), 1e-10)
