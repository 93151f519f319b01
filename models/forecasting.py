"""Networks over sequences of numbers, as Aaren's experiments have them  (arXiv:2405.13956)."""

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..kernels import checks
from ..layers.attention import AttentionConfig
from ..layers.linear import Linear
from ..layers.position import rotary_angles, rotary_frequencies
from ..sharding.ops import positions
from .backbone import Backbone, made_from
from .block import stream_dtype
from .config import BackboneConfig
from .pattern import parse

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SeriesConfig(BackboneConfig):
    """Everything that shapes a network over a sequence of numbers.

    Positions are added to what is read, as in the Transformers whose attention Aaren replaces: it
    has none of its own, and attention has no rotary ones here unless they are asked for. Source:
    arXiv:2405.13956. Raises ValueError for values that cannot be, or do not go together.
    """

    width: int = 32
    """Width of the residual stream, in features."""
    depth: int = 2
    """Number of blocks."""
    pattern: str = "aaren+gelu"
    """Blocks as `mixer[+mlp][*n]`, comma separated, repeated to `depth`."""
    norm: Literal["rms", "layer", "simple"] = "layer"
    """Norm before each mixer and MLP and after the last: rms, layer, or simple."""
    attention: AttentionConfig = field(default_factory=lambda: AttentionConfig(rope_base=None))
    """Softmax attention blocks."""
    positions: Literal["none", "sinusoidal", "learned"] = "sinusoidal"
    """What is added to a token's projection for its distance from its document's first token:
    nothing, sines and cosines (arXiv:1706.03762), or a learned vector."""
    init_std: float = 0.02
    """Standard deviation of the initial weights of what is said, and of learned positions."""
    inputs: Annotated[int, tyro.conf.Suppress] = 1
    """Numbers that a token has; no flag, for it follows from the task."""
    outputs: Annotated[int, tyro.conf.Suppress] = 1
    """Numbers that are said at each token; no flag either."""
    length: Annotated[int, tyro.conf.Suppress] = 64
    """Learned positions; no flag either."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("inputs", "outputs", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if not self.attention.causal:
            raise ValueError("attention.causal=False shows a forecast what it is to predict")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"width={self.width} with sinusoidal positions; it must be even")
        if self.moe.router.kind == "expert-choice" and "moe" in {
            kind.mlp for kind in parse(self.pattern, self.depth)
        }:
            raise ValueError(
                "moe.router.kind=expert-choice lets a later token take an earlier one's expert; a "
                "forecast needs a router that looks at one token, such as softmax"
            )


class SeriesModel(Backbone):
    """y = output(norm(blocks(input(x) + position))): at every token, of all tokens up to it.

    A state is {"blocks": the blocks' own, "position": int32 (B,)}. A document with more tokens than
    there are learned positions reads nan, because a compiled function cannot raise. Source:
    arXiv:2405.13956. Raises ValueError for another kind of config, and for arrays and states that
    do not fit.
    """

    config: SeriesConfig

    def __init__(self, config: SeriesConfig, *, rngs: nnx.Rngs):
        made_from(config, SeriesConfig, rngs)
        dtype = jnp.dtype(config.param_dtype)
        stream, normal = stream_dtype(config), jax.nn.initializers.normal

        def linear(din, dout, std, dtype):
            kinds = {"dtype": dtype, "param_dtype": jnp.dtype(config.param_dtype)}
            return Linear(din, dout, kernel_init=normal(std), rngs=rngs, **kinds)

        self.input = linear(config.inputs, config.width, config.inputs**-0.5, stream)
        self.position = nnx.data(None)
        if config.positions == "learned":
            shape = (config.length, config.width)
            self.position = nnx.Param(normal(config.init_std)(rngs.params(), shape, dtype))
        super().__init__(config, rngs=rngs)
        exact = jnp.promote_types(jnp.float32, config.dtype)
        self.output = linear(config.width, config.outputs, config.init_std, exact)

    def __call__(
        self,
        x: Float[Array, "B T inputs"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T outputs"], State]:
        """What is said at every token, in at least float32, and the state after the last one."""
        y, state, _ = self.said(x, state, reset)
        return y, state

    def said(
        self,
        x: Float[Array, "B T inputs"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T outputs"], State, dict[str, Array]]:
        """The same, and the blocks' auxiliary values; a key says that the model is trained."""
        checks.stream(x, reset)
        start, given = (None, None) if state is None else (state["position"], state["blocks"])
        index, following = positions(x.shape[1], start, reset)
        h = self.input(x)
        if self.config.positions != "none":
            h = h + self._positions(index).astype(h.dtype)
        h, blocks, aux = self.mix(h, given, reset, key)
        following = jnp.broadcast_to(following, x.shape[:1])
        return self.output(h), {"blocks": blocks, "position": following}, aux

    def init_state(self, batch: int, max_length: int) -> State:
        """The state before any token; caches have room for `max_length` tokens."""
        blocks = super().init_state(batch, max_length)
        return {"blocks": blocks, "position": jnp.zeros((batch,), jnp.int32)}

    def _positions(self, index: Int[Array, "b T"]) -> Float[Array, "b T D"]:
        if self.position is not None:
            return jnp.take(self.position[...], index, axis=0, mode="fill", fill_value=jnp.nan)
        exact = jnp.promote_types(jnp.float32, self.config.dtype)
        angle = rotary_angles(index, rotary_frequencies(self.config.width, dtype=exact))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
