"""Whole networks, each from one frozen dataclass."""

from .config import LMConfig, ResidualConfig
from .forecasting import SeriesConfig, SeriesModel
from .layout import by_layer, decayed, from_layers, merge, rebalanced, split
from .lm import LM
from .presets import PRESETS
from .video import VIDEO_PRESETS, Video, VideoConfig

__all__ = [
    "LM",
    "PRESETS",
    "VIDEO_PRESETS",
    "LMConfig",
    "ResidualConfig",
    "SeriesConfig",
    "SeriesModel",
    "Video",
    "VideoConfig",
    "by_layer",
    "decayed",
    "from_layers",
    "merge",
    "rebalanced",
    "split",
]
