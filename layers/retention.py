"""Retention: linear attention with one constant decay a head and rotary positions."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks
from ..sharding.ops import linear_attention, positions
from . import decay
from .constant import Constant
from .conv import ShortConv
from .depth import ONLY, Depth
from .gate import swish_gated
from .linear import Linear, columns, rows
from .norm import RMSNorm, SimpleRMSNorm
from .position import rotary_angles, rotate_half, rotate_interleaved


@dataclasses.dataclass(frozen=True)
class RetentionConfig:
    """Retention (RetNet, arXiv:2307.08621). The defaults are flash-linear-attention's model; the
    authors' torchscale sets interleaved, inclusive and scale_keys, and takes norm_scale away."""

    heads: int = 4
    """Number of heads."""
    kv_heads: int | None = None
    """Number of key and value heads, which divides `heads`; None is `heads`."""
    key_ratio: float = 1.0
    """Width of all queries together over model width."""
    value_ratio: float = 2.0
    """Width of all heads' outputs together over model width."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies, which fall from 1 radian per token to 1 / base."""
    interleaved: bool = False
    """Whether rotary turns features (2i, 2i + 1) rather than (i, i + K/2)."""
    inclusive: bool = False
    """Whether the rotary exponents are spaced to include 1, rather than 2i/K."""
    scale_keys: bool = False
    """Whether keys rather than queries are scaled by K^-0.5."""
    conv: int = 0
    """Taps of the short convolutions on queries, keys and values; 0 is none."""
    norm_scale: bool = True
    """Whether the norm of each head's output has a weight."""
    norm_eps: float = 1e-6
    """Epsilon of the norm of each head's output."""
    init_std: float | None = None
    """Initial standard deviation of all kernels; None is the authors': Xavier-uniform of gain
    2^-2.5, and 2^-1 for the output projection."""


class Retention(nnx.Module):
    """y = out(norm(S_t^T q_t K^-0.5) * silu(gate(x))), S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T.

    Queries and keys, after a convolution and silu if there is one, are turned by their position
    (arXiv:2307.08621). The sums are not rescaled before the norm, so that all forms agree to
    rounding. Raises ValueError for heads that do not divide the widths, and for keys of an odd
    width.
    """

    def __init__(
        self,
        width: int,
        config: RetentionConfig = RetentionConfig(),
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
        if keys % (2 * self.heads) or values % self.heads or self.heads % self.groups:
            raise ValueError(
                f"retention of width {width}: {self.heads} heads must divide the key width {keys} "
                f"into even parts and the value width {values}; {self.groups} kv_heads must divide "
                f"{self.heads} heads"
            )
        self.key, self.value = keys // self.heads, values // self.heads
        small = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
        large = nnx.initializers.variance_scaling(2**-2, "fan_avg", "uniform")
        if config.init_std is not None:
            small = large = nnx.initializers.normal(config.init_std)
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        linear = partial(Linear, use_bias=False, dtype=dtype, **kinds)
        self.q = linear(width, keys, kernel_init=small)
        self.k = linear(width, self.groups * self.key, kernel_init=small)
        self.v = linear(width, self.groups * self.value, kernel_init=small)
        self.gate = linear(width, values, kernel_init=small)
        self.out = linear(values, width, kernel_init=large)
        self.norm = SimpleRMSNorm(config.norm_eps, dtype=exact)
        if config.norm_scale:
            self.norm = RMSNorm(self.value, config.norm_eps, dtype=exact, **kinds)
        self.conv = nnx.Dict()
        for name in "qkv" if config.conv else "":
            channels = getattr(self, name).out_features
            self.conv[name] = ShortConv(
                channels, config.conv, bias=False, silu=True, dtype=dtype, **kinds
            )
        exponents = np.linspace(0, 1, self.key // 2, endpoint=config.inclusive)
        self.log_decay = Constant(jnp.asarray(decay.retention(self.heads), exact))
        self.frequencies = Constant(jnp.asarray(config.rotary_base**-exponents, exact))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: dict[str, Array] | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """y, and the state after the last token: `S` (B, H, K, V), float32 at least, `position`
        (B,) and the convolutions' windows. Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        before, after = state or {"position": jnp.zeros(x.shape[0], jnp.int32)}, {}
        index, after["position"] = positions(x.shape[1], before["position"], reset)
        angle = rotary_angles(index, self.frequencies[...])
        rotate = rotate_interleaved if self.config.interleaved else rotate_half
        _, *qkv, gate = columns(x, self.q, self.k, self.v, self.gate)
        qkv = dict(zip("qkv", qkv, strict=True))
        for name, conv in self.conv.items():
            window = before.get(f"conv_{name}")
            qkv[name], after[f"conv_{name}"] = conv(qkv[name], window, reset)
        q, k = (rearrange(qkv[name], "b t (h k) -> b t h k", k=self.key) for name in "qk")
        v = rearrange(qkv["v"], "b t (h v) -> b t h v", v=self.value)
        q, k = rotate(q, angle), rotate(k, angle)
        if self.config.scale_keys:
            k = k * self.key**-0.5
        else:
            q = q * self.key**-0.5
        y, after["S"] = linear_attention(
            q, k, v, self.log_decay[...], state=before.get("S"), reset=reset
        )
        y = rearrange(self.norm(y), "b t h v -> b t (h v)")
        return rows(self.out, swish_gated(y, gate)), after

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> dict[str, Array]:
        """The state before any token, of a size that does not grow with `max_length`."""
        S = jnp.zeros((batch, self.heads, self.key, self.value), self.exact)
        windows = {f"conv_{n}": conv.init_window(batch, dtype) for n, conv in self.conv.items()}
        return {"S": S, "position": jnp.zeros((batch,), jnp.int32)} | windows
