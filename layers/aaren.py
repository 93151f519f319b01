"""Aaren: attention whose query is learned, so that it is a recurrence  (arXiv:2405.13956)."""

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks
from ..kernels.monoid import LOWEST
from ..sharding.ops import fixed_query
from .depth import ONLY, Depth
from .linear import Linear, columns, rows

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class AarenConfig:
    """Aaren (arXiv:2405.13956)."""

    heads: int = 4
    """Heads; each has width / heads features."""
    bias: bool = False
    """Biases in the projections."""
    init_std: float = 0.02
    """Initial standard deviation of the kernels; of the output's, this over the root of the model's
    residual branches."""


class Aaren(nnx.Module):
    """y_t = W sum_{i<=t} softmax_i(q . k_i / sqrt(head width)) v_i, one q for all tokens.

    q is the projection of a learned token, which starts as a draw from a unit normal.
    Source: arXiv:2405.13956. Raises ValueError if the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        config: AarenConfig = AarenConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % config.heads:
            raise ValueError(f"width={width} does not divide into heads={config.heads}")
        self.heads, self.head_width, self.dtype = (config.heads, width // config.heads, dtype)

        def linear(gain=1.0):
            return Linear(
                width,
                width,
                use_bias=config.bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=nnx.initializers.normal(gain * config.init_std),
                rngs=rngs,
            )

        self.token = nnx.Param(rngs.params.normal((width,), param_dtype))
        self.q, self.k, self.v = linear(), linear(), linear()
        self.out = linear(depth.branches**-0.5)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T W"], State]:
        """y, and the state after the last token: `m` and `u` (B, H), `w` (B, H, V), float32 at
        least. Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        q = rearrange(self.q(self.token[...]), "(h k) -> h k", h=self.heads)
        _, *kv = columns(x, self.k, self.v)
        k, v = (rearrange(y, "b t (h k) -> b t h k", h=self.heads) for y in kv)
        carried = None if state is None else (state["m"], state["u"], state["w"])
        y, (m, u, w) = fixed_query(q, k, v, state=carried, reset=reset)
        return rows(self.out, rearrange(y, "b t h v -> b t (h v)")), {"m": m, "u": u, "w": w}

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> State:
        """The state before any token; its size does not depend on `max_length`."""
        del max_length, dtype
        exact = jnp.promote_types(jnp.float32, self.dtype)
        none = jnp.zeros((batch, self.heads), exact)
        return {
            "m": jnp.full_like(none, LOWEST),
            "u": none,
            "w": jnp.zeros((batch, self.heads, self.head_width), exact),
        }
