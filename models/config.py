"""The frozen dataclasses that networks are built from: what all share, and a language model's."""

import dataclasses
import math
from dataclasses import field
from numbers import Integral, Real
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import tyro

from ..layers.aaren import AarenConfig
from ..layers.attention import AttentionConfig
from ..layers.gated_conv import GatedConvConfig
from ..layers.gla import GLAConfig
from ..layers.lightning import LightningConfig
from ..layers.mamba import MambaConfig
from ..layers.mamba2 import Mamba2Config
from ..layers.mlp import MLPConfig
from ..layers.moe import MoEConfig
from ..layers.retention import RetentionConfig
from ..layers.vir import VirConfig
from .pattern import FRAMES, imported, parse


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """How a block adds what its mixer and its MLP return: x = alpha r + beta f(norm(x)), r = x. The
    factors are written alpha, beta. MiniMax-01 (arXiv:2501.08313) sets normed."""

    normed: bool = False
    """Whether r is norm(x) rather than x, so that the stream itself is normed."""
    linear: tuple[float, float] = (1.0, 1.0)
    """The factors of every mixer but softmax attention."""
    attention: tuple[float, float] = (1.0, 1.0)
    """The factors of softmax attention."""
    mlp: tuple[float, float] = (1.0, 1.0)
    """The factors of MLPs and of mixtures of experts."""
    scale: float | None = None
    """LayerScale (arXiv:2103.17239): the initial value of what each feature of a branch is then
    multiplied by, learned for each branch; None: nothing."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Everything that shapes the blocks of a network.

    Raises ValueError for values that cannot be, or do not go together.
    """

    width: int = 256
    """Width of the residual stream, in features."""
    depth: int = 4
    """Number of blocks."""
    pattern: str = "gla+swiglu"
    """Blocks as `mixer[+mlp][*n]`, comma separated, repeated to `depth`. Mixers: gla, retention,
    vir, lightning, mamba, mamba2, aaren, attention, conv, or module:Class for one of your own.
    MLPs: swiglu, geglu, gelu, glu, moe, none."""
    norm: Literal["rms", "layer", "simple"] = "rms"
    """Norm before each mixer and MLP and after the last: RMSNorm, LayerNorm, or RMSNorm without
    weights."""
    norm_eps: float = 1e-5
    """Added to the mean square (variance) in these norms."""
    residual_float32: bool = True
    """Whether the residual stream is float32 whatever the compute dtype."""
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    """What a block adds to the residual stream."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype; decays, norms' statistics, states, logits and the loss stay float32."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype in which parameters are kept."""
    pipeline: Annotated[tuple[int, int], tyro.conf.Suppress] = (1, 1)
    """Stages, and parts of the model in each, that the blocks are stacked for; no flag, for it
    follows from --mesh and --schedule.rounds."""
    stacked: Annotated[bool, tyro.conf.Suppress] = True
    """Whether like blocks in a row have their variables stacked; no flag: one by one they take as
    long to compile as they are many, however many, and no weights are copied in decoding."""
    unroll: int = 8
    """Up to so many like blocks in a row are compiled one after the other, quicker on a CPU, on one
    device and without remat. Else, and more of them, are a loop, compiled as long as one block."""
    remat: Literal["none", "full", "dots"] = "none"
    """What a block keeps for the backward pass: all, its input only (full), or results of products
    of weights and of kernels (dots), less memory and little that is computed again."""
    mlp: MLPConfig = field(default_factory=MLPConfig)
    """The MLPs."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Mixtures of experts."""
    gla: GLAConfig = field(default_factory=GLAConfig)
    """Gated linear attention blocks."""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    """Retention (RetNet) blocks."""
    vir: VirConfig = field(default_factory=VirConfig)
    """Retention (ViR) blocks."""
    lightning: LightningConfig = field(default_factory=LightningConfig)
    """Lightning attention (TransNormerLLM) blocks."""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    """Mamba blocks."""
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    """Mamba-2 blocks."""
    aaren: AarenConfig = field(default_factory=AarenConfig)
    """Aaren blocks."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Softmax attention blocks."""
    conv: GatedConvConfig = field(default_factory=GatedConvConfig)
    """Gated short convolution (LFM2) blocks."""

    @property
    def grows(self) -> bool:
        """Whether its state grows with the sequence: softmax attention without a window does, and
        a mixer of one's own whose class says `grows = True`."""
        kinds = set(parse(self.pattern, self.depth))
        own = any(kind.own and getattr(imported(kind.mixer), "grows", False) for kind in kinds)
        attention = "attention" in {kind.mixer for kind in kinds}
        return own or (attention and self.attention.window is None)

    @property
    def frame(self) -> tuple[int, int] | None:
        """Height and width of a token of the stream, where tokens are frames (B, T, H, W, D)."""
        return None

    def __post_init__(self):
        for each in dataclasses.fields(self):
            _check_kind(each.name, getattr(self, each.name), each.type)
        for name in ("width", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        for each in dataclasses.fields(self):
            _check_numbers(each.name, getattr(self, each.name))
        kinds = parse(self.pattern, self.depth)
        for kind in kinds:
            if kind.mixer in FRAMES and self.frame is None:
                raise ValueError(
                    f"pattern {self.pattern!r}: {kind.mixer} is for frames of a video, "
                    "as a models.VideoConfig or --preset video-bouncing has them"
                )
        used = {"attention" if kind.mixer == "attention" else "linear" for kind in kinds}
        used |= {"mlp" for kind in kinds if kind.mlp != "none"}
        for name in {"linear", "attention", "mlp"} - used:
            if (factors := getattr(self.residual, name)) != (1.0, 1.0):
                raise ValueError(
                    f"residual.{name}={factors}, but pattern {self.pattern!r} has no such part"
                )


@dataclasses.dataclass(frozen=True)
class LMConfig(BackboneConfig):
    """Everything that shapes a language model; its fields are the command line's model flags.

    Raises ValueError for values that cannot be, or do not go together.
    """

    vocab: int = 256
    """Number of token ids."""
    vocab_multiple: int = 1
    """The embedding (and head) have rows up to a multiple of this; logits have `vocab` entries."""
    tie_head: bool = True
    """Whether the embedding's rows are also the head's columns."""
    embed_scale: bool = False
    """Whether embeddings are multiplied by sqrt(width)."""
    init_std: float = 0.02
    """Standard deviation of the embedding's, and an untied head's, initial weights."""
    loss_chunk: int = 0
    """Tokens whose logits exist at once in the loss: as many time steps of all rows as fit, and at
    least one; 0: all."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.loss_chunk < 0:
            raise ValueError(f"loss_chunk={self.loss_chunk}; it must be 0 (all) or more")
        if not self.attention.causal:
            raise ValueError("attention.causal=False shows a language model what it is to predict")
        kinds = parse(self.pattern, self.depth)
        if self.moe.router.kind == "expert-choice" and "moe" in {kind.mlp for kind in kinds}:
            raise ValueError(
                "moe.router.kind=expert-choice lets a later token take an earlier one's expert; a "
                "language model needs a router that looks at one token, such as softmax"
            )


MAY_BE_ZERO = (
    "conv",
    "lrpe_layers",
    "shared",
)  # of the mixers' whole numbers; the others are sizes
MAY_BE_INFINITE = ("mamba2.dt_limit",)
POSITIVE = ("ratio", "key_ratio", "value_ratio", "expand", "rope_base", "rotary_base")
POSITIVE += ("decay_temperature", "dt_min", "dt_max")
NOT_NEGATIVE = ("norm_eps", "init_std")


def _check_kind(name: str, value: object, kind: Any) -> None:
    """A field holds what it is declared as, and so do the fields of a group of flags."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        if value not in kinds:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, kinds))}")
    elif dataclasses.is_dataclass(kind):
        if not isinstance(value, cast(type, kind)):
            raise ValueError(f"{name}={value!r}; it must be a {getattr(kind, '__name__', kind)}")
        for each in dataclasses.fields(kind):
            _check_kind(f"{name}.{each.name}", getattr(value, each.name), each.type)
    elif kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}; it must be True or False")
    elif get_origin(kind) is tuple and Ellipsis not in kinds:
        if not (isinstance(value, tuple) and len(value) == len(kinds)):
            raise ValueError(f"{name}={value!r}; it must be a tuple of {len(kinds)} numbers")
    elif kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name}={value!r}; it must be a text")
    elif get_origin(kind) is not tuple and (int in kinds or float in kinds):
        number = Real if float in kinds else Integral
        if not (isinstance(value, number) or (value is None and type(None) in kinds)):
            what = "a number" if float in kinds else "a whole number"
            raise ValueError(f"{name}={value!r}; it must be {what}")


def _check_numbers(name: str, value: object) -> None:
    """Sizes are at least 1, numbers finite and of the right sign, in the groups of flags too."""
    numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Real)]
    if not all(map(math.isfinite, numbers)) and name not in MAY_BE_INFINITE:
        raise ValueError(f"{name}={value}; it must be finite")
    last = name.rpartition(".")[2]
    if isinstance(value, Real) and value <= 0 and last in POSITIVE:
        raise ValueError(f"{name}={value}; it must be more than 0")
    if isinstance(value, Real) and value < 0 and last in NOT_NEGATIVE:
        raise ValueError(f"{name}={value}; it must be 0 or more")
    if not dataclasses.is_dataclass(value):
        return
    for each in dataclasses.fields(value):
        inner = getattr(value, each.name)
        _check_numbers(f"{name}.{each.name}", inner)
        least, whole = (
            0 if each.name in MAY_BE_ZERO else 1,
            int in (get_args(each.type) or (each.type,)),
        )
        if whole and isinstance(inner, Integral) and inner < least:
            raise ValueError(f"{name}.{each.name}={inner}; it must be at least {least}")
