"""Where a block stands in its model, for what depends on it: decays by depth, initial weights."""

from typing import NamedTuple


class Depth(NamedTuple):
    layer: int = 0
    """Blocks before this one."""
    layers: int = 1
    """Blocks of the model."""
    branches: int = 1
    """Residual branches of the model, one for each mixer and each MLP. The last projection of a
    branch starts divided by the root of this, so that their sum starts as large as one (GPT-2)."""


ONLY = Depth()  # a block that is the whole model
