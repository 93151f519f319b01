"""Convolutions over the height and width of images in time, each image alone."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels import convolution
from ..sharding import sequence


def convolve(
    x: Float[Array, "B T H W I"], kernel: Float[Array, "h w I O"]
) -> Float[Array, "B T H W O"]:
    """y[i, j] = sum_ab x[i + a - h // 2, j + b - w // 2] kernel[a, b], zero outside the image.

    In the dtype of both, float32 exactly so on every backend; on a mesh each image stays where it
    is, and the kernel lies whole on every device.
    """

    return sequence.run_each(convolution.convolve, x, kernel)


class Kernel(nnx.Module):
    """A parameter called `kernel`, by which weight decay knows it."""

    def __init__(self, value: Array):
        self.kernel = nnx.Param(value)


class ImageConv(nnx.Module):
    """convolve(x, kernel) + bias, in `dtype`; the kernel starts normal with variance
    gain / inputs of a sum (LeCun's if 1), the bias zero.

    Source: LeCun et al., Proc. IEEE 86 (1998).
    """

    def __init__(
        self,
        din: int,
        dout: int,
        size: int = 3,
        *,
        gain: float = 1.0,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        draw = nnx.initializers.variance_scaling(gain, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(draw(rngs.params(), (size, size, din, dout), param_dtype))
        bias = nnx.Param(jnp.zeros(dout, param_dtype)) if use_bias else None
        self.bias = nnx.data(bias)

    def __call__(self, x: Float[Array, "B T H W I"]) -> Float[Array, "B T H W O"]:
        """y, image by image, in `dtype`."""
        y = convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
