"""Softmax attention with rotary positions, grouped keys and a cache  (arXiv:1706.03762)."""

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks
from ..kernels.attention import cache
from ..sharding import mesh
from ..sharding.decoding import over_cache
from ..sharding.ops import attention, positions
from .depth import ONLY, Depth
from .linear import Linear, columns, rows
from .position import rotary_angles, rotary_frequencies, rotate_half

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention, with grouped keys and values and a sliding window as options.

    Source: arXiv:1706.03762; grouped keys are arXiv:2305.13245's, the window arXiv:2310.06825's.
    """

    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads, which divide the query heads; as many as those if None."""
    head_width: int | None = None
    """Features of one head; width / heads if None."""
    window: int | None = None
    """Tokens that a query sees, itself included; all before it in its document if None."""
    causal: bool = True
    """Whether a token sees none after it; otherwise it sees its whole document."""
    rope_base: float | None = 10000.0
    """Base of the rotary frequencies, which fall from 1 radian per token towards 1 / base; no
    positions if None."""
    bias: bool = False
    """Biases in the projections of q, k and v."""
    out_bias: bool = False
    """A bias in the output projection."""
    init_std: float = 0.02
    """Initial standard deviation of the kernels; of the output's, this over the root of the model's
    residual branches."""


class Attention(nnx.Module):
    """y_t = W sum_s softmax_s(q_t . k_s / sqrt(head_width)) v_s over the document so far.

    If it is not causal, over all of the document, and then there is no state.

    `init_state` makes a ring of `max_length` tokens, or of `window` where that is less: new tokens
    take the places of the oldest. A query whose document (or window) reaches back to a token that
    is gone returns nan, because a compiled function cannot raise; so `max_length` must be at least
    the length of the longest document, not counting padding before its reset.

    Source: arXiv:1706.03762, with rotary positions (arXiv:2104.09864). Raises ValueError for heads
    that do not divide, and for options that exclude each other.
    """

    def __init__(
        self,
        width: int,
        config: AttentionConfig = AttentionConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        heads = config.heads
        kv_heads = heads if config.kv_heads is None else config.kv_heads
        if config.head_width is None and width % heads:
            raise ValueError(f"width={width} does not divide into heads={heads}; set head_width")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide heads={heads}")
        if config.window is not None and config.window < 1:
            raise ValueError(f"window={config.window}; it must be at least 1")
        if config.window is not None and not config.causal:
            raise ValueError(f"window={config.window} with causal=False; leave one of them out")
        self.head_width = config.head_width or width // heads
        if config.rope_base is not None and self.head_width % 2:
            raise ValueError(f"head width {self.head_width} with rotary positions; it must be even")
        self.config, self.dtype, self.kv_heads = config, dtype, kv_heads

        def linear(din, dout, bias, gain=1.0):
            init = nnx.initializers.normal(gain * config.init_std)
            return Linear(
                din,
                dout,
                use_bias=bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=init,
                rngs=rngs,
            )

        inner, shared = heads * self.head_width, kv_heads * self.head_width
        self.q = linear(width, inner, config.bias)
        self.k, self.v = (linear(width, shared, config.bias), linear(width, shared, config.bias))
        self.out = linear(inner, width, config.out_bias, depth.branches**-0.5)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T W"], State | None]:
        """y, and the cache after the last token; None without a state.

        Raises ValueError for an x or a reset of another shape, and for a state if it is not causal.
        """
        checks.stream(x, reset)
        if state is not None and not self.config.causal:
            raise ValueError("attention with causal=False sees what comes later: it takes no state")
        start = None if state is None else state["length"] - state["start"]
        index, following = positions(x.shape[1], start, reset)
        _, *qkv = columns(x, self.q, self.k, self.v)
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", k=self.head_width) for y in qkv)
        if self.config.rope_base is not None:
            exact = jnp.promote_types(jnp.float32, self.dtype)
            frequencies = rotary_frequencies(self.head_width, self.config.rope_base, exact)
            angle = rotary_angles(index, frequencies)
            q, k = rotate_half(q, angle), rotate_half(k, angle)
        window = self.config.window
        if state is None:
            sight: Any = {"causal": self.config.causal, "window": window}
            y = cast(Array, attention(q, k, v, **sight, reset=reset))
        else:
            y, rings = over_cache(q, k, v, state, index, window)
            length = state["length"] + x.shape[1]
            state = {**rings, "length": length, "start": length - following}
        return rows(self.out, rearrange(y, "b t h v -> b t (h v)")), state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> State:
        """An empty cache for `max_length` tokens (`window` where that is less).

        On a mesh it has room for a few more, so that its slots divide over `seq`.
        """
        window = self.config.window
        size = max_length if window is None else min(window, max_length)
        return cache.empty(batch, mesh.up(size, "seq"), self.kv_heads, self.head_width, dtype)
