"""Video: frames encoded, a sequence model over them, the next frame decoded  (arXiv:2310.19694)."""

import dataclasses
import math
from dataclasses import field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels import checks
from ..layers.convlstm import ConvLSTMConfig
from ..layers.convs5 import ConvS5Config
from ..layers.frame import Decoder, Encoder
from .backbone import Backbone, made_from
from .config import BackboneConfig
from .pattern import FRAMES, parse


@dataclasses.dataclass(frozen=True)
class VideoConfig(BackboneConfig):
    """Everything that shapes a model of video; its fields are the command line's model flags.

    Source: arXiv:2310.19694. Raises ValueError for values that cannot be, or do not go together.
    """

    pattern: str = "convs5"
    """Blocks as of any network: of frames (convs5, convlstm, which stand without an MLP), or of
    tokens, each a place of an encoded frame, row by row."""
    norm: Literal["rms", "layer", "simple"] = "layer"
    """Norm before each mixer and MLP of tokens and after the last: rms, layer, or simple."""
    size: tuple[int, int] = (64, 64)
    """Height and width of a frame, in pixels."""
    channels: int = 1
    """Numbers of a pixel, each from -1 to 1."""
    patch: int = 1
    """Height and width of the squares of pixels that the encoder's first stage makes channels."""
    stages: tuple[int, ...] = (64, 128, 256)
    """Channels of the encoder's stages, and backwards of the decoder's; each stage but the first
    halves height and width."""
    groups: int = 32
    """Groups of their norms, which divide the channels."""
    convs5: ConvS5Config = field(default_factory=lambda: ConvS5Config(block="resnet"))
    """ConvS5 blocks; their `image` follows from size."""
    convlstm: ConvLSTMConfig = field(default_factory=ConvLSTMConfig)
    """ConvLSTM blocks; their `image` follows from size."""

    @property
    def frame(self) -> tuple[int, int]:
        factor = self.patch * 2 ** (len(self.stages) - 1)
        return self.size[0] // factor, self.size[1] // factor

    @property
    def of_frames(self) -> bool:
        """Whether the blocks take frames, and not the tokens in them."""
        return parse(self.pattern, self.depth)[0].mixer in FRAMES

    def __post_init__(self):
        numbers = ("channels", "patch", "groups")
        least = [(name, getattr(self, name)) for name in numbers]
        least += [(name, n) for name in ("size", "stages") for n in getattr(self, name)]
        for name, value in least:
            if value < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if not self.stages:
            raise ValueError("stages=(); the encoder needs at least one")
        factor = self.patch * 2 ** (len(self.stages) - 1)
        if any(n % factor for n in self.size):
            raise ValueError(f"size={self.size} does not divide by {factor}: patch, and stages")
        if any(n % self.groups for n in self.stages):
            raise ValueError(f"groups={self.groups} do not divide stages={self.stages}")
        super().__post_init__()
        kinds = parse(self.pattern, self.depth)
        if len({kind.mixer in FRAMES for kind in kinds}) > 1:
            raise ValueError(f"pattern {self.pattern!r} mixes blocks of frames and of tokens")
        if "moe" in {kind.mlp for kind in kinds}:
            raise ValueError(f"pattern {self.pattern!r}: models of video have no moe")


class Video(Backbone):
    """next frame = decode(blocks(encode(frames))), at every frame.

    Frames are (B, T, height, width, channels) in [-1, 1]. Where blocks take tokens, the tokens of
    all frames are one sequence: the token at place i of frame t sees all earlier frames and the
    earlier places of its own, carries a learned position of its place besides what its mixer knows
    of order, and predicts place i of frame t + 1. Source: arXiv:2310.19694. Raises ValueError for
    another kind of config, and for arrays and states that do not fit.
    """

    config: VideoConfig

    def __init__(self, config: VideoConfig, *, rngs: nnx.Rngs):
        made_from(config, VideoConfig, rngs)
        kinds: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        scales = (config.patch, *(2 for _ in config.stages[1:]))
        shape = config.channels, config.stages, scales, config.width, config.groups
        self.encoder, self.decoder = Encoder(*shape, **kinds), Decoder(*shape, **kinds)
        self.position = nnx.data(None)
        if not config.of_frames:
            draw = jax.nn.initializers.normal(0.02)
            place = draw(rngs.params(), (*config.frame, config.width), kinds["param_dtype"])
            self.position = nnx.Param(place)
        super().__init__(config, rngs=rngs)

    def init_state(self, batch: int, max_length: int) -> tuple:
        """The state before any frame; caches have room for `max_length` frames."""
        tokens = 1 if self.config.of_frames else math.prod(self.config.frame)
        return super().init_state(batch, max_length * tokens)

    def __call__(
        self, frames: Float[Array, "B T H W C"], state: tuple | None = None
    ) -> tuple[Float[Array, "B T H W C"], tuple]:
        """The frame that follows each, in (-1, 1), and the state after the last."""
        checks.axes("frames", frames, "B T H W C")
        config = self.config
        if frames.shape[2:] != (*config.size, config.channels):
            raise ValueError(
                f"frames of {frames.shape[2:]}; the model takes {(*config.size, config.channels)}: "
                "height, width, channels"
            )
        x = self.encoder(frames)
        if self.position is None:
            x, state, _ = self.mix(x, state)
        else:
            x = x + self.position[...].astype(x.dtype)
            tokens, state, _ = self.mix(x.reshape(x.shape[0], -1, x.shape[-1]), state)
            x = tokens.reshape(x.shape)
        return self.decoder(x), state

    def generate(
        self, frames: Float[Array, "B T H W C"], count: int
    ) -> Float[Array, "B count H W C"]:
        """`count` frames after these: read at once, then one at a time with the state."""
        state = self.init_state(frames.shape[0], frames.shape[1] + count)
        after, state = self(frames, state)
        return self.roll(after[:, -1:], state, count)[0]

    def roll(
        self, frame: Float[Array, "B 1 H W C"], state: tuple, count: int
    ) -> tuple[Float[Array, "B count H W C"], Float[Array, "B 1 H W C"], tuple]:
        """(`count` frames of which `frame` is the first, the next frame, the state before it)."""

        def step(carry, _):
            frame, state = carry
            return self(frame, state), frame[:, 0]

        (frame, state), frames = jax.lax.scan(step, (frame, state), length=count)
        return jnp.moveaxis(frames, 0, 1), frame, state
