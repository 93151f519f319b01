"""Gated linear attention: the decay of each key feature is a function of the token."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks, keep
from ..sharding.ops import linear_attention
from .conv import ShortConv
from .depth import ONLY, Depth
from .gate import swish_gated
from .linear import Linear, columns, rows
from .norm import RMSNorm, SimpleRMSNorm


@dataclasses.dataclass(frozen=True)
class GLAConfig:
    """Gated linear attention (arXiv:2312.06635)."""

    heads: int = 4
    """Number of heads."""
    kv_heads: int | None = None
    """Number of key and value heads, which divides `heads`; None is `heads`."""
    key_ratio: float = 0.5
    """Width of all queries together over model width."""
    value_ratio: float = 1.0
    """Width of all heads' outputs together over model width."""
    decay_rank: int = 16
    """Rank of the projection that makes the decays."""
    decay_temperature: float = 16.0
    """The log decay is logsigmoid(.) over this: larger forgets more slowly."""
    decay_min: float | None = None
    """Lower bound of the log decay, in nats per token; None is no bound."""
    conv: int = 0
    """Taps of the short convolutions on queries, keys and values; 0 is none."""
    norm_scale: bool = True
    """Whether the norm of each head's output has a weight."""
    norm_eps: float = 1e-6
    """Epsilon of the norm of each head's output."""
    init_std: float | None = 0.02
    """Initial standard deviation of all kernels; None is the paper's code: Xavier-uniform of gain
    2^-2.5 for queries, keys and decays, uniform in +-1/sqrt(fan in) for the others."""


class GLA(nnx.Module):
    """y = out(norm(S_t^T q_t K^-0.5) * silu(gate(x))), S_t = diag(a_t) S_{t-1} + k_t v_t^T.

    log a_t = logsigmoid(up(down(x_t))) / 16, one for each key feature (arXiv:2312.06635). Raises
    ValueError for heads that do not divide the widths of keys and values.
    """

    def __init__(
        self,
        width: int,
        config: GLAConfig = GLAConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del depth  # every block is alike
        self.config, self.heads, self.groups = config, config.heads, config.kv_heads or config.heads
        self.exact = exact = jnp.promote_types(jnp.float32, dtype)
        keys, values = round(width * config.key_ratio), round(width * config.value_ratio)
        if keys % self.heads or values % self.heads or self.heads % self.groups:
            raise ValueError(
                f"GLA of width {width}: {self.heads} heads must divide the key width {keys} and "
                f"the value width {values}; {self.groups} kv_heads must divide {self.heads} heads"
            )
        self.key, self.value = keys // self.heads, values // self.heads
        small = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
        plain = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        if config.init_std is not None:
            small = plain = nnx.initializers.normal(config.init_std)
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        linear = partial(Linear, use_bias=False, dtype=dtype, **kinds)
        self.q = linear(width, keys, kernel_init=small)
        self.k = linear(width, self.groups * self.key, kernel_init=small)
        self.v = linear(width, self.groups * self.value, kernel_init=plain)
        self.decay_down = linear(width, config.decay_rank, kernel_init=small)
        self.decay_up = linear(  # the decays are float32 from here on
            config.decay_rank,
            self.groups * self.key,
            use_bias=True,
            dtype=exact,
            kernel_init=small,
        )
        self.gate = linear(width, values, kernel_init=plain)
        self.norm = SimpleRMSNorm(config.norm_eps, dtype=exact)
        if config.norm_scale:
            self.norm = RMSNorm(self.value, config.norm_eps, dtype=exact, **kinds)
        self.out = linear(values, width, kernel_init=plain)
        self.conv = nnx.Dict()
        for name in "qkv" if config.conv else "":
            channels = getattr(self, name).out_features
            self.conv[name] = ShortConv(
                channels, config.conv, bias=False, silu=True, dtype=dtype, **kinds
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: dict[str, Array] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """y, and the state after the last token: `S` (B, H, K, V), float32 at least, and the
        convolutions' windows. Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        before = state or {"S": None}
        x, *qkv, gate = columns(x, self.q, self.k, self.v, self.gate)
        qkv, after = dict(zip("qkv", qkv, strict=True)), {}
        for name, conv in self.conv.items():
            window = before.get(f"conv_{name}")
            qkv[name], after[f"conv_{name}"] = conv(qkv[name], window, reset)
        q, k = (rearrange(qkv[name], "b t (h k) -> b t h k", k=self.key) for name in "qk")
        v = rearrange(qkv["v"], "b t (h v) -> b t h v", v=self.value)

        @keep.again
        def decays(x):
            x = jax.nn.log_sigmoid(x) / self.config.decay_temperature
            x = x if self.config.decay_min is None else jnp.maximum(x, self.config.decay_min)
            return repeat(x, "b t (g k) -> b t (g r) k", k=self.key, r=self.heads // self.groups)

        log_decay = decays(self.decay_up(self.decay_down(x)))
        y, after["S"] = linear_attention(
            q * self.key**-0.5, k, v, log_decay, state=before["S"], reset=reset
        )
        y = rearrange(self.norm(y), "b t h v -> b t (h v)")
        return rows(self.out, swish_gated(y, gate)), after

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> dict[str, Array]:
        """The state before any token, of a size that does not grow with `max_length`."""
        windows = {f"conv_{n}": conv.init_window(batch, dtype) for n, conv in self.conv.items()}
        return {"S": jnp.zeros((batch, self.heads, self.key, self.value), self.exact)} | windows
