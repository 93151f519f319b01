"""Channel mixers: gated linear units and the two-layer GELU network."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels import keep
from .depth import ONLY, Depth
from .linear import Linear, columns, rows


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes and initialisation of every MLP of a model.

    SwiGLU and GeGLU are arXiv:2002.05202's, GELU is arXiv:1606.08415's.
    """

    hidden: int | None = None
    """Hidden width in features; None takes it from `ratio`."""
    ratio: float = 8 / 3
    """Hidden width over model width, used when `hidden` is None."""
    multiple_of: int = 64
    """The hidden width taken from `ratio` is rounded up to a multiple of this many features."""
    bias: bool = False
    """Whether the projections have biases."""
    tanh: bool = False
    """Whether GELU is its tanh approximation (GPT-2, Gemma) rather than exact."""
    init_std: float | None = 0.02
    """Initial standard deviation of the kernels; None draws from +-1/sqrt(fan in) uniformly."""
    scale_residual: bool = False
    """Whether the last kernel starts divided by sqrt(residual branches), as in GPT-2."""

    def width(self, width: int) -> int:
        """The hidden width for a model of this width."""
        if self.hidden is not None:
            return self.hidden
        return -(-int(self.ratio * width) // self.multiple_of) * self.multiple_of


class GLU(nnx.Module):
    """down(gate(x) * up(x)), nothing non-linear but the product: TransNormerLLM's SGLU.

    Source: arXiv:2307.14995.
    """

    def __init__(
        self,
        width: int,
        config: MLPConfig = MLPConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = config.width(width)
        make = _projections(config, depth, dtype, param_dtype, rngs)
        self.gate, self.up = make(width, hidden), make(width, hidden)
        self.down = make(hidden, width, last=True)
        self.tanh = config.tanh

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """y, each token alone."""
        _, gate, up = columns(x, self.gate, self.up)
        gated = keep.again(lambda gate, up: self.activation(gate) * up)
        return rows(self.down, gated(gate, up))

    def activation(self, x: Array) -> Array:
        """What the gate goes through."""
        return x


class SwiGLU(GLU):
    """down(silu(gate(x)) * up(x))  (arXiv:2002.05202)."""

    def activation(self, x: Array) -> Array:
        return jax.nn.silu(x)


class GeGLU(GLU):
    """down(gelu(gate(x)) * up(x))  (arXiv:2002.05202)."""

    def activation(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.tanh)


class GELU(nnx.Module):
    """down(gelu(up(x)))  (arXiv:1606.08415)."""

    def __init__(
        self,
        width: int,
        config: MLPConfig = MLPConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = config.width(width)
        make = _projections(config, depth, dtype, param_dtype, rngs)
        self.up, self.down = make(width, hidden), make(hidden, width, last=True)
        self.tanh = config.tanh

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """y, each token alone."""
        _, up = columns(x, self.up)
        return rows(self.down, keep.again(partial(jax.nn.gelu, approximate=self.tanh))(up))


def _projections(config, depth, dtype, param_dtype, rngs):
    """A maker of projections with the config's bias and initialisation."""

    def make(size: int, features: int, *, last: bool = False) -> nnx.Linear:
        shrink = depth.branches**-0.5 if last and config.scale_residual else 1.0
        init = nnx.initializers.variance_scaling(shrink**2 / 3, "fan_in", "uniform")
        if config.init_std is not None:
            init = nnx.initializers.normal(config.init_std * shrink)
        return Linear(
            size,
            features,
            use_bias=config.bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=init,
            rngs=rngs,
        )

    return make
