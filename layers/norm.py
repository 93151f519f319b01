"""Normalisations, with statistics in float32 at least."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels import keep


def rms_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 at least  (arXiv:1910.07467)."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def layer_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(variance + eps) over the last axis, in float32 at least."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def group_norm(x: Float[Array, "... H W D"], groups: int, eps: float) -> Float[Array, "... H W D"]:
    """(x - mean) / sqrt(variance + eps) over an image and a group of channels, float32 at least."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    grouped = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    grouped = grouped - jnp.mean(grouped, axis=(-4, -3, -1), keepdims=True)
    variance = jnp.mean(grouped * grouped, axis=(-4, -3, -1), keepdims=True)
    return (grouped * jax.lax.rsqrt(variance + eps)).reshape(x.shape)


class RMSNorm(nnx.Module):
    """rms_norm(x) * scale, returned in `dtype`; axes before the last, such as heads, are batch.

    Source: arXiv:1910.07467.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs  # every norm takes it; ones need no randomness
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """x normed, in `dtype`."""

        @keep.again
        def normed(x, scale):
            return (rms_norm(x, self.eps) * scale).astype(self.dtype)

        return normed(x, self.scale[...])


class LayerNorm(nnx.Module):
    """layer_norm(x) * scale + bias, returned in `dtype`  (arXiv:1607.06450)."""

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """x normed, in `dtype`."""

        @keep.again
        def normed(x, scale, bias):
            return (layer_norm(x, self.eps) * scale + bias).astype(self.dtype)

        return normed(x, self.scale[...], self.bias[...])


class GroupNorm(nnx.Module):
    """group_norm(x) * scale + bias, returned in `dtype`  (arXiv:1803.08494).

    Raises ValueError for groups that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        groups: int = 32,
        eps: float = 1e-5,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        if groups < 1 or width % groups:
            raise ValueError(f"groups={groups} do not divide the width {width}")
        self.groups, self.eps, self.dtype = groups, eps, dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... H W D"]) -> Float[Array, "... H W D"]:
        """x normed, in `dtype`."""

        @keep.again
        def normed(x, scale, bias):
            return (group_norm(x, self.groups, self.eps) * scale + bias).astype(self.dtype)

        return normed(x, self.scale[...], self.bias[...])


class SimpleRMSNorm(nnx.Module):
    """rms_norm(x) without a weight, returned in `dtype`  (TransNormerLLM, arXiv:2307.14995)."""

    def __init__(self, eps: float = 1e-6, *, dtype: DTypeLike = jnp.float32):
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """x normed, in `dtype`."""
        return keep.again(lambda x: rms_norm(x, self.eps).astype(self.dtype))(x)
