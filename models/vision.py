"""Images as sequences of patches that a backbone reads: ViR, and a ViT by another mixer."""

import dataclasses
from dataclasses import field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ..kernels import checks
from ..layers.attention import AttentionConfig
from ..layers.linear import Linear
from ..layers.mlp import MLPConfig
from ..layers.vir import VirConfig
from ..sharding import mesh, schedule
from .backbone import Backbone, made_from
from .block import stream_dtype
from .config import BackboneConfig, ResidualConfig
from .pattern import parse

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class VisionConfig(BackboneConfig):
    """Everything that shapes a classifier of images. The defaults are ViR-S (arXiv:2310.19731);
    pattern attention+gelu makes a ViT of it, which sees all patches at once unless
    attention.causal is set.

    Raises ValueError for values that cannot be, or do not go together.
    """

    image: tuple[int, int] = (224, 224)
    """Height and width of an image in pixels."""
    channels: int = 3
    """Numbers of a pixel."""
    patch: int = 16
    """Height and width of a patch in pixels, which divide the image's."""
    classes: int = 1000
    """Number of classes."""
    bidirectional: bool = False
    """Whether the patches are read twice, the second time from the last to the first, so that with
    a causal mixer too each meets all others. It takes twice the tokens, and is no stream."""
    width: int = 384
    """Width of the residual stream, in features."""
    depth: int = 12
    """Number of blocks."""
    pattern: str = "vir+gelu"
    """Blocks as `mixer[+mlp][*n]`, comma separated, repeated to `depth`; mixers without positions
    of their own (vir, attention, gla, mamba, ...) and MLPs are those of language models."""
    norm: Literal["rms", "layer", "simple"] = "layer"
    """Norm before each mixer and MLP and after the last: rms, layer, or simple."""
    residual: ResidualConfig = field(default_factory=lambda: ResidualConfig(scale=1e-5))
    """What a block adds to the residual stream."""
    mlp: MLPConfig = field(default_factory=lambda: MLPConfig(ratio=4.0, bias=True))
    """The MLPs."""
    vir: VirConfig = field(default_factory=lambda: VirConfig(heads=6))
    """Retention (ViR) blocks."""
    attention: AttentionConfig = field(
        default_factory=lambda: AttentionConfig(
            heads=6, causal=False, rope_base=None, bias=True, out_bias=True
        )
    )
    """Softmax attention blocks."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of patches, and patches of a row."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def streams(self) -> bool:
        """Whether patches may be read one after another, with a state."""
        whole = {kind.mixer for kind in parse(self.pattern, self.depth)} & {"attention"}
        return not self.bidirectional and not (whole and not self.attention.causal)

    def __post_init__(self):
        super().__post_init__()
        for name in ("channels", "patch", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if min(self.image) < 1 or any(size % self.patch for size in self.image):
            height, width = self.image
            raise ValueError(f"patch={self.patch} does not divide an image of {height} x {width}")


def patches(
    images: Float[Array | np.ndarray, "B height width channels"], patch: int
) -> Float[Array | np.ndarray, "B N features"]:
    """Patches row by row; features are a patch's rows, their pixels, and each pixel's channels."""
    if images.ndim != 4 or any(size % patch for size in images.shape[1:3]):
        raise ValueError(
            f"images of shape {images.shape} in patches of {patch} x {patch}; they must be (B, "
            "height, width, channels), a height and width that the patch divides"
        )
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


class Vision(Backbone):
    """logits = output(norm(blocks([input(patches) + positions, class token]))_last): ViR, ViT.

    The class token comes last, so that it has seen every patch where a mixer sees only what came
    before. Then the recurrent form gives a class after any patches: `read` some, `classify`, and go
    on from the same state. Source: arXiv:2310.19731, arXiv:2010.11929. Raises ValueError for
    another kind of config, and for arrays and states that do not fit.
    """

    config: VisionConfig

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        made_from(config, VisionConfig, rngs)
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        (rows, columns), width = config.grid, config.width
        init = jax.nn.initializers.normal(0.02)
        kinds = {"kernel_init": init, "param_dtype": param_dtype, "rngs": rngs}
        self.input = Linear(config.patch**2 * config.channels, width, dtype=dtype, **kinds)
        self.position = nnx.Param(init(rngs.params(), (rows * columns, width), param_dtype))
        self.class_token = nnx.Param(init(rngs.params(), (width,), param_dtype))
        super().__init__(config, rngs=rngs)
        exact = jnp.promote_types(jnp.float32, dtype)
        self.output = Linear(width, config.classes, dtype=exact, **kinds)

    def __call__(self, patches: Float[Array, "B N features"]) -> Float[Array, "B classes"]:
        """The logits of whole images in one pass, in at least float32."""
        return self.output(self.hidden(patches)[0])

    def hidden(
        self, patches: Float[Array, "B N features"], key: Array | None = None
    ) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        """The class token after the last norm, and the blocks' auxiliary values."""
        rows, columns = self.config.grid
        checks.axes("patches", patches, "B N features")
        if patches.shape[1] != rows * columns:
            raise ValueError(f"{patches.shape[1]} patches; images have {rows} x {columns}")
        x = self.embed(patches)
        if self.config.bidirectional:
            x = jnp.concatenate([x, x[:, ::-1]], axis=1)
        last = x.shape[1]
        x = jnp.concatenate([x, self.token(x.shape[0])], axis=1)
        x, reset = padded(x)
        x, _, aux = self.mix(x, None, reset, key)
        return x[:, last], aux

    def embed(
        self, patches: Float[Array, "B N features"], first: Array | int = 0
    ) -> Float[Array, "B N D"]:
        """The stream of patches whose first is that of this number, of each row if it has (B, 1).

        An image has no patch after its last: nan.
        """
        number = first + jnp.arange(patches.shape[1], dtype=jnp.int32)
        position = self.position[...].at[number].get(mode="fill", fill_value=jnp.nan)
        stream = stream_dtype(self.config)
        return self.input(patches).astype(stream) + position.astype(stream)

    def token(self, rows: int) -> Float[Array, "B 1 D"]:
        """The class token of each row."""
        token = self.class_token[...].astype(stream_dtype(self.config))
        return jnp.broadcast_to(token, (rows, 1, self.config.width))

    def init_state(self, batch: int, max_length: int | None = None) -> State:
        """The state before any patch: the blocks', and `position`, how many each row has read.

        Caches have room for an image, or for `max_length` tokens, one of them the class token.
        """
        config = self.config
        if not config.streams:
            why = "bidirectional" if config.bidirectional else "attention without causal"
            raise ValueError(f"{why}: it reads an image's patches all at once, and has no state")
        rows, columns = config.grid
        state = super().init_state(batch, max_length or rows * columns + 1)
        return {"blocks": state, "position": jnp.zeros((batch,), jnp.int32)}

    def read(self, patches: Float[Array, "B N features"], state: State) -> State:
        """The state after more patches, as many as one likes, in the order of `patches`."""
        x = self.embed(patches, state["position"][:, None])
        _, blocks, _ = self.mix(x, state["blocks"])
        return {"blocks": blocks, "position": state["position"] + patches.shape[1]}

    def classify(self, state: State) -> Float[Array, "B classes"]:
        """The logits after the patches read so far; the state stays as it is."""
        x, _, _ = self.mix(self.token(state["position"].shape[0]), state["blocks"])
        return self.output(x[:, 0])


def padded(x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T2 D"], Array | None]:
    """The stream with zeros after it, so that its length divides over the mesh, as a document of
    their own; and the resets that make it one.

    Attention in zigzag wants two parts a device, and a ring of matmuls lays time over tensor too.
    """
    ring = schedule.in_force().matmul == "ring"
    parts = mesh.size("seq", "tensor") if ring else mesh.size("seq")
    time = x.shape[1]
    padding = -time % (2 * parts) if parts > 1 else 0
    if not padding:
        return x, None
    reset = jnp.arange(time + padding, dtype=jnp.int32) == time
    x = jnp.pad(x, [(0, 0), (0, padding), (0, 0)])
    return x, jnp.broadcast_to(reset, x.shape[:2])
