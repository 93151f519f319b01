"""Rotary embeddings of positions (arXiv:2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def rotary_frequencies(
    width: int, base: float = 10000.0, dtype: DTypeLike = np.float32
) -> Float[np.ndarray, "P"]:
    """base^(-2 i / width) radians per token, for i < P = width / 2."""
    if width % 2:
        raise ValueError(f"rotary embedding of width {width}; it must be even")
    return (base ** (-np.arange(0, width, 2, dtype=np.float64) / width)).astype(dtype)


def rotary_angles(
    index: Int[Array, "B T"], frequencies: Float[Array, "P"] | np.ndarray
) -> Float[Array, "B T P"]:
    """The angle in radians of each pair of features at each position."""
    return index[..., None].astype(frequencies.dtype) * frequencies


def rotate_half(
    x: Float[Array, "B T H K"], angle: Float[Array, "b T P"]
) -> Float[Array, "B T H K"]:
    """Turn the pairs (x_i, x_{i + K/2}): the layout of Llama and of fla's RetNet."""
    cos, sin = _cos_sin(x, angle)
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_interleaved(
    x: Float[Array, "B T H K"], angle: Float[Array, "b T P"]
) -> Float[Array, "B T H K"]:
    """Turn the pairs (x_{2i}, x_{2i + 1}): the layout of torchscale's RetNet."""
    cos, sin = _cos_sin(x, angle)
    a, b = x[..., 0::2].astype(cos.dtype), x[..., 1::2].astype(cos.dtype)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _cos_sin(x, angle):
    """Both with an axis for heads, in at least float32."""
    exact = jnp.promote_types(jnp.float32, x.dtype)
    angle = angle[:, :, None].astype(exact)
    # else XLA for CPUs computes them again for each head, in each place that reads them
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
