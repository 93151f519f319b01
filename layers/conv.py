"""Short causal convolution along time, one filter a channel."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..kernels import keep
from ..kernels.documents import positions
from ..sharding import sequence

BLOCK = 128  # tokens whose share of the kernel's gradient is summed at once


class ShortConv(nnx.Module):
    """y_t = bias + sum_{j < size} kernel[size - 1 - j] x_{t-j}, or silu of it.

    Inputs before the start of a document count as zero. Kernel and bias are drawn uniformly from
    +-1/sqrt(size), as in the released Mamba (arXiv:2312.00752). Raises ValueError for fewer than
    one tap.
    """

    def __init__(
        self,
        channels: int,
        size: int = 4,
        bias: bool = True,
        *,
        silu: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if size < 1:
            raise ValueError(f"a convolution of {size} taps; it needs at least 1")
        self.size, self.channels, self.silu, self.dtype = size, channels, silu, dtype
        limit = size**-0.5
        draw = rngs.params.uniform
        self.kernel = nnx.Param(draw((size, channels), param_dtype, -limit, limit))
        self.bias = nnx.Param(draw((channels,), param_dtype, -limit, limit)) if bias else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        window: Float[Array, "B W D"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
        """y in the compute dtype, and the last size - 1 inputs of the current document.

        `window` is what an earlier call returned; the new one has its dtype (that of x if None).
        """
        if window is None:
            window = self.init_window(x.shape[0], x.dtype)
        bias = None if self.bias is None else self.bias[...]
        weights = self.kernel[...].astype(self.dtype), bias
        spread = P(None, "tensor"), None if bias is None else P("tensor")
        y, after = sequence.run_window(
            partial(_convolved, silu=self.silu), x, weights, window, reset, spread
        )
        return y, after

    def init_window(self, batch: int, dtype: DTypeLike) -> Float[Array, "B W D"]:
        """The window before any token."""
        return jnp.zeros((batch, self.size - 1, self.channels), dtype)


def _convolved(x, weights, window, reset, silu):
    """(y in the kernel's dtype, the last inputs of the current document)."""
    (batch, time, _), past = x.shape, window.shape[1]
    kernel, bias = weights
    padded = jnp.concatenate([window.astype(x.dtype), x], axis=1)
    exact = jnp.promote_types(jnp.float32, kernel.dtype)
    age = jnp.full((batch, time), past, jnp.int32)  # how far back each token may look
    if reset is not None:
        age, _ = positions(time, age[:, 0], reset)

    @keep.again
    def activated(kernel, bias, padded, age):
        y = convolve(kernel.astype(exact), padded, age)
        y = y if bias is None else y + bias.astype(exact)
        return (jax.nn.silu(y) if silu else y).astype(kernel.dtype)

    y = activated(kernel, bias, padded, age)
    lags = jnp.arange(past - 1, -1, -1, dtype=jnp.int32)
    tail = jnp.where((age[:, -1:] >= lags)[..., None], padded[:, time:], 0)
    return y, tail.astype(window.dtype)


@jax.custom_vjp
def convolve(
    kernel: Float[Array, "J D"], padded: Float[Array, "B P D"], age: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """y_t = sum_j kernel[J - 1 - j] x_{t-j} over j < J and j <= age_t; J - 1 inputs precede x_0.

    A sum of shifted products, many times faster on a CPU than a depthwise `lax.conv`. So is the
    backward pass written out: it sums the kernel's gradient by blocks that stay in cache.
    """
    past, time = kernel.shape[0] - 1, age.shape[1]
    y = jnp.zeros((), kernel.dtype)
    for lag in range(past + 1):
        x = padded[:, past - lag : past - lag + time].astype(kernel.dtype)
        y = y + kernel[past - lag] * _seen(x, age, lag)
    return y


def _seen(x, age, lag):
    """x where the token `lag` before is of the same document, else zero."""
    return jnp.where((age >= lag)[..., None], x, 0) if lag else x


def _pad(x, before, after):
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _forward(kernel, padded, age):
    return convolve(kernel, padded, age), (kernel, padded, age)


def _backward(residuals, ct):
    kernel, padded, age = residuals
    past, time = kernel.shape[0] - 1, age.shape[1]
    wide, ages = _pad(ct, past, past), _pad(age, past, past)
    d_padded = jnp.zeros((), ct.dtype)
    for lag in range(past + 1):
        after = slice(lag, lag + past + time)  # the outputs that each input reaches by this lag
        d_padded = d_padded + kernel[past - lag] * _seen(wide[:, after], ages[:, after], lag)

    block = min(BLOCK, time)
    blocks = -(-time // block)
    ct, age, inputs = (_pad(x, 0, blocks * block - time) for x in (ct, age, padded))

    def add(total, i):
        def cut(x, size):
            return jax.lax.dynamic_slice_in_dim(x, i * block, size, axis=1)

        g, old, x = cut(ct, block), cut(age, block), cut(inputs, block + past).astype(ct.dtype)
        taps = [
            jnp.sum(g * _seen(x[:, tap : tap + block], old, past - tap), axis=(0, 1))
            for tap in range(past + 1)
        ]
        return total + jnp.stack(taps), None

    steps = jnp.arange(blocks, dtype=jnp.int32)
    d_kernel, _ = jax.lax.scan(add, jnp.zeros_like(kernel), steps)
    return d_kernel, d_padded.astype(padded.dtype), None


convolve.defvjp(_forward, _backward)
