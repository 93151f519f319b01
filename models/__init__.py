"""Whole networks, each from one frozen dataclass."""

from .config import LMConfig, ResidualConfig
from .forecasting import SeriesConfig, SeriesModel
from .layout import by_layer, decayed, from_layers, merge, rebalanced, split
from .lm import LM
from .presets import PRESETS, VIDEO_PRESETS, VISION_PRESETS
from .video import Video, VideoConfig
from .vision import Vision, VisionConfig

__all__ = [
    "LM",
    "PRESETS",
    "VIDEO_PRESETS",
    "VISION_PRESETS",
    "LMConfig",
    "ResidualConfig",
    "SeriesConfig",
    "SeriesModel",
    "Video",
    "VideoConfig",
    "Vision",
    "VisionConfig",
    "by_layer",
    "decayed",
    "from_layers",
    "merge",
    "rebalanced",
    "split",
]
