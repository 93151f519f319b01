"""Whole networks, each from one frozen dataclass."""

from .config import LMConfig, ResidualConfig
from .layout import by_layer, decayed, from_layers, merge, rebalanced, split
from .lm import LM
from .presets import PRESETS

__all__ = [
    "LM",
    "PRESETS",
    "LMConfig",
    "ResidualConfig",
    "by_layer",
    "decayed",
    "from_layers",
    "merge",
    "rebalanced",
    "split",
]
