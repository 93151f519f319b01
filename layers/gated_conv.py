"""LFM2's mixer: a short convolution between two gates  (arXiv:2511.23404)."""

import dataclasses
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks
from .conv import ShortConv
from .depth import ONLY, Depth
from .linear import Linear, columns, rows


@dataclasses.dataclass(frozen=True)
class GatedConvConfig:
    """Gated short convolution (LFM2): what is near, in a state of a few tokens.

    Source: arXiv:2511.23404.
    """

    taps: int = 3
    """Length of the causal convolution in tokens."""
    init_std: float = 0.02
    """Initial standard deviation of the kernels; of the output's, this over the root of the model's
    residual branches."""


class GatedConv(nnx.Module):
    """y = out(gate(x) * conv(z(x) * v(x))): it looks no further back than its taps.

    Before mixers that compare single tokens (softmax attention, Aaren) it makes one of neighbours,
    such as a key and the value after it. Source: arXiv:2511.23404.
    """

    def __init__(
        self,
        width: int,
        config: GatedConvConfig = GatedConvConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        normal = nnx.initializers.normal
        init = normal(config.init_std)
        linear = partial(Linear, width, width, use_bias=False, kernel_init=init, **kinds)
        self.v, self.z, self.gate = linear(), linear(), linear()
        self.conv = ShortConv(width, config.taps, bias=False, **kinds)
        self.out = linear(kernel_init=normal(config.init_std * depth.branches**-0.5))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: dict[str, Array] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """y, and the state after the last token: `conv`, the last taps - 1 inputs (B, taps - 1, D).

        Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        _, v, z, gate = columns(x, self.v, self.z, self.gate)
        y, window = self.conv(z * v, None if state is None else state["conv"], reset)
        return rows(self.out, gate * y), {"conv": window}

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> dict[str, Array]:
        """The last taps - 1 inputs of the convolution, before any token."""
        return {"conv": self.conv.init_window(batch, dtype)}
