"""Lightning attention as in TransNormerLLM: a constant decay by head and by depth."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks, keep
from ..sharding.ops import linear_attention, positions
from . import decay
from .constant import Constant
from .depth import ONLY, Depth
from .linear import Linear, columns, rows
from .norm import RMSNorm, SimpleRMSNorm


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Lightning attention (TransNormerLLM, arXiv:2307.14995). MiniMax sets lrpe_layers=0,
    decay="minimax", silu_values, sigmoid_gate and norm_scale."""

    heads: int = 4
    """Number of heads."""
    head_width: int | None = None
    """Features of a head; None is model width over `heads`."""
    lrpe_layers: int = 1
    """How many of the first layers have LRPE, the linearised relative positions; it doubles their
    state."""
    decay: Literal["released", "paper", "fla", "minimax"] = "released"
    """Schedule of the decays by head and depth; see layers/decay.py."""
    silu_values: bool = False
    """Whether values, like queries and keys, go through silu."""
    sigmoid_gate: bool = False
    """Whether the output gate goes through a sigmoid."""
    norm_scale: bool = False
    """Whether the norm of the output has a weight."""
    norm_eps: float = 1e-6
    """Epsilon of the norm of the output."""
    init_std: float = 0.02
    """Initial standard deviation of all kernels."""


class Lightning(nnx.Module):
    """y = out(norm(S_t^T q_t) * gate(x)), S_t = exp(log_decay) S_{t-1} + k_t v_t^T; q, k by silu.

    The norm is over all heads together. Where there is LRPE, q and k become [x cos(theta t),
    x sin(theta t)] with a theta that is learnt (arXiv:2307.14995). Raises ValueError for heads
    that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        config: LightningConfig = LightningConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, heads = config, config.heads
        self.exact = exact = jnp.promote_types(jnp.float32, dtype)
        if config.head_width is None and width % heads:
            raise ValueError(f"lightning of width {width}: {heads} heads must divide it")
        self.size = config.head_width or width // heads
        inner = heads * self.size
        linear = partial(
            Linear,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(config.init_std),
            rngs=rngs,
        )
        self.q, self.k, self.v = (linear(width, inner) for _ in range(3))
        self.gate, self.out = linear(width, inner), linear(inner, width)
        self.norm = SimpleRMSNorm(config.norm_eps, dtype=exact)
        if config.norm_scale:
            self.norm = RMSNorm(inner, config.norm_eps, dtype=exact, param_dtype=param_dtype)
        self.log_decay = Constant(
            jnp.asarray(decay.lightning(config.decay, heads, depth.layer, depth.layers), exact)
        )
        self.lrpe = depth.layer < config.lrpe_layers
        if self.lrpe:
            theta = 10000.0 ** (-2 / inner * np.arange(inner).reshape(heads, self.size))
            self.theta = nnx.Param(jnp.asarray(theta, param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: dict[str, Array] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """y, and the state after the last token: `S` (B, H, K, V), float32 at least, and with LRPE
        `position` (B,). Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        _, q, k, v, gate = columns(x, self.q, self.k, self.v, self.gate)
        silu = keep.again(jax.nn.silu)
        q, k, v = silu(q), silu(k), silu(v) if self.config.silu_values else v
        after = {}
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", k=self.size) for y in (q, k, v))
        if self.lrpe:
            batch, time, _ = x.shape
            start = jnp.zeros((batch,), jnp.int32) if state is None else state["position"]
            index, after["position"] = positions(time, start, reset)
            angle = index[:, :, None, None].astype(self.exact) * self.theta[...]
            turn = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
            q, k = ((jnp.tile(y, 2) * turn).astype(y.dtype) for y in (q, k))
        y, after["S"] = linear_attention(
            q, k, v, self.log_decay[...], state=None if state is None else state["S"], reset=reset
        )

        @keep.again
        def gated(y, gate):
            gate = gate.astype(self.exact)
            return y * (jax.nn.sigmoid(gate) if self.config.sigmoid_gate else gate)

        y = self.norm(rearrange(y, "b t h v -> b t (h v)"))
        return rows(self.out, gated(y, gate)), after

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> dict[str, Array]:
        """The state before any token, of a size that does not grow with `max_length`."""
        key = 2 * self.size if self.lrpe else self.size
        state = {"S": jnp.zeros((batch, self.config.heads, key, self.size), self.exact)}
        if self.lrpe:
            state["position"] = jnp.zeros((batch,), jnp.int32)
        return state
