"""ViR's retention: linear attention with one constant decay a head, and nothing else around it."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks
from ..sharding.ops import linear_attention
from . import decay
from .constant import Constant
from .depth import ONLY, Depth
from .linear import Linear, columns, rows
from .norm import LayerNorm, RMSNorm


@dataclasses.dataclass(frozen=True)
class VirConfig:
    """Retention of Vision Retention Networks (arXiv:2310.19731).

    Raises ValueError for another decay or norm.
    """

    heads: int = 4
    """Number of heads, which divides the width."""
    decay: Literal["paper", "code"] = "paper"
    """Each head's decay a token: 1 - 2^(-5-h), or as in the authors' code from 1 - 1/32 to
    1 - 1/512, evenly in the logarithm of what is forgotten."""
    norm: Literal["none", "head", "layer"] = "head"
    """What the output projection reads: the sums, as in the paper, which grow with 1 / (1 - decay);
    each head's RMSNorm, as in RetNet; or GELU of a LayerNorm over all heads."""
    norm_eps: float = 1e-5
    """Epsilon of that norm."""
    chunk: int | None = None
    """Tokens that are computed at once: the sequence's length is the parallel form, 1 the recurrent
    one; None chooses by measurement. The numbers are the same."""
    init_std: float = 0.02
    """Initial standard deviation of the kernels; of the output's, this over the root of the model's
    residual branches."""

    def __post_init__(self):
        if self.decay not in ("paper", "code"):
            raise ValueError(f"vir.decay={self.decay!r} is not one of paper, code")
        if self.norm not in ("none", "head", "layer"):
            raise ValueError(f"vir.norm={self.norm!r} is not one of none, head, layer")


class Vir(nnx.Module):
    """y_t = out(norm(S_t^T q_t K^-0.5)), S_t = gamma_h S_{t-1} + k_t v_t^T; no gate, no rotation.

    The authors' parallel form takes a softmax over scores that are already masked: what a token may
    not see then weighs e^0, and no recurrence computes that. This is the linear form, whatever
    `chunk` is, so that training in parallel and reading a stream give the same numbers. Source:
    arXiv:2310.19731. Raises ValueError if the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        config: VirConfig = VirConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % config.heads:
            raise ValueError(f"width={width} does not divide into vir.heads={config.heads}")
        self.config, self.head = config, width // config.heads
        self.exact = exact = jnp.promote_types(jnp.float32, dtype)
        kinds = {"param_dtype": param_dtype, "rngs": rngs}

        def linear(gain: float = 1.0):
            init = nnx.initializers.normal(gain * config.init_std)
            return Linear(width, width, dtype=dtype, kernel_init=init, **kinds)

        self.q, self.k, self.v = linear(), linear(), linear()
        self.out = linear(depth.branches**-0.5)
        self.norm: Any = nnx.data(None)
        if config.norm == "head":
            self.norm = RMSNorm(self.head, config.norm_eps, dtype=exact, **kinds)
        elif config.norm == "layer":
            self.norm = LayerNorm(width, config.norm_eps, dtype=exact, **kinds)
        logs = decay.retention if config.decay == "paper" else decay.vir
        self.log_decay = Constant(jnp.asarray(logs(config.heads), exact))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: dict[str, Array] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """y, and the state after the last token: `S` (B, H, K, V), float32 at least.

        Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        _, *qkv = columns(x, self.q, self.k, self.v)
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", k=self.head) for y in qkv)
        y, S = linear_attention(
            q * self.head**-0.5,
            k,
            v,
            self.log_decay[...],
            state=None if state is None else state["S"],
            reset=reset,
            chunk=self.config.chunk,
        )
        if self.config.norm == "head":
            y = self.norm(y)
        y = rearrange(y, "b t h v -> b t (h v)")
        if self.config.norm == "layer":
            y = jax.nn.gelu(self.norm(y), approximate=False)
        return rows(self.out, y), {"S": S}

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> dict[str, Array]:
        """The state before any token, of a size that does not grow with `max_length`."""
        shape = batch, self.config.heads, self.head, self.head
        return {"S": jnp.zeros(shape, self.exact)}
