"""Models at published sizes. Names are those of the papers; sources stand beside each family."""

import dataclasses

from ..layers.gla import GLAConfig
from ..layers.lightning import LightningConfig
from ..layers.mlp import MLPConfig
from ..layers.retention import RetentionConfig
from ..layers.vir import VirConfig
from .config import LMConfig
from .video import VideoConfig
from .vision import VisionConfig


def _mamba(pattern: str, multiple: int, width: int, depth: int) -> LMConfig:
    """Mamba (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060) with the GPT-NeoX vocabulary."""
    return LMConfig(
        vocab=50277,
        vocab_multiple=multiple,
        width=width,
        depth=depth,
        pattern=pattern,
        loss_chunk=4096,
    )


def _gla(width: int, tie_head: bool) -> LMConfig:
    """Gated linear attention (arXiv:2312.06635) as in its released checkpoints."""
    return LMConfig(
        vocab=32000,
        width=width,
        depth=24,
        norm_eps=1e-6,
        tie_head=tie_head,
        loss_chunk=4096,
        mlp=MLPConfig(multiple_of=256),
        gla=GLAConfig(heads=4),
    )


def _retnet(width: int, depth: int) -> LMConfig:
    """RetNet (arXiv:2307.08621): the paper's widths and depths, heads of 256 keys and 512 values,
    with the SwiGLU, RMSNorm and vocabulary of the checkpoints released for 1.3B and 2.7B."""
    return LMConfig(
        vocab=32000,
        width=width,
        depth=depth,
        pattern="retention+swiglu",
        norm_eps=1e-6,
        tie_head=False,
        loss_chunk=4096,
        mlp=MLPConfig(ratio=4 / 3, multiple_of=256),
        retention=RetentionConfig(heads=width // 256),
    )


def _tnl(vocab: int, width: int, depth: int, hidden: int) -> LMConfig:
    """TransNormerLLM (arXiv:2307.14995), heads of 128 features, LRPE in the first block."""
    return LMConfig(
        vocab=vocab,
        width=width,
        depth=depth,
        pattern="lightning+glu",
        norm="simple",
        norm_eps=1e-6,
        embed_scale=True,
        loss_chunk=4096,
        mlp=MLPConfig(hidden=hidden),
        lightning=LightningConfig(heads=width // 128),
    )


PRESETS: dict[str, LMConfig] = {
    # about 1.5 million parameters over bytes: minutes on a laptop
    "small": LMConfig(
        width=160, depth=4, mlp=MLPConfig(hidden=512), gla=GLAConfig(heads=5, conv=4)
    ),
    "mamba-130m": _mamba("mamba", 8, 768, 24),
    "mamba-370m": _mamba("mamba", 8, 1024, 48),
    "mamba-790m": _mamba("mamba", 8, 1536, 48),
    "mamba-1.4b": _mamba("mamba", 8, 2048, 48),
    "mamba-2.8b": _mamba("mamba", 8, 2560, 64),
    "mamba2-130m": _mamba("mamba2", 16, 768, 24),
    "mamba2-370m": _mamba("mamba2", 16, 1024, 48),
    "mamba2-780m": _mamba("mamba2", 16, 1536, 48),
    "mamba2-1.3b": _mamba("mamba2", 16, 2048, 48),
    "mamba2-2.7b": _mamba("mamba2", 16, 2560, 64),
    "gla-340m": _gla(1024, tie_head=True),
    "gla-1.3b": _gla(2048, tie_head=False),
    "retnet-1.3b": _retnet(2048, 24),
    "retnet-2.7b": _retnet(2560, 32),
    "retnet-6.7b": _retnet(4096, 32),
    "tnl-385m": _tnl(50272, 1024, 24, 2816),
    "tnl-1b": _tnl(64000, 2048, 16, 5632),
    "tnl-7b": _tnl(64000, 4096, 30, 11008),
}
"""Language models by name; the number is that of their parameters."""


def _vir(width: int, heads: int) -> VisionConfig:
    """ViR (arXiv:2310.19731): images of 224 x 224 pixels in patches of 16, 1000 classes, and the
    decays of the authors' code. RetNet's norm of each head stands for what the paper leaves out."""
    vir = VirConfig(heads=heads, decay="code")
    return VisionConfig(
        width=width,
        depth=12,
        vir=vir,
        attention=dataclasses.replace(VisionConfig().attention, heads=heads),
    )


VISION_PRESETS: dict[str, VisionConfig] = {"vir-s": _vir(384, 6), "vir-b": _vir(768, 12)}
"""Classifiers of images by name."""


def _moving_mnist(width: int) -> VideoConfig:
    """Two digits in frames of 64 x 64 (arXiv:2310.19694, table 9): 16 x 16 places, eight layers."""
    return VideoConfig(width=width, depth=8)


VIDEO_PRESETS: dict[str, VideoConfig] = {
    # named for the frames of a training clip; each is asked for 1,200 frames more
    "convs5-moving-mnist-300": _moving_mnist(256),
    "convs5-moving-mnist-600": _moving_mnist(128),
}
"""Models of video by name."""
