"""Published checkpoints: directories of safetensors and config.json, read and written.

A family is a file here with `read` (their options to our config), `write` (the way back), `pieces`
(which numbers of their tensors are which of ours) and `BUFFERS` (what they store besides, which
nobody needs); with `buffers` where their loader wants them all the same, and `HEAD` where that has
a name of its own. `families` has it under what config.json calls its kind of model.
"""

from .families import FAMILIES
from .reading import Pretrained, load_pretrained
from .weights import UncheckedWarning
from .writing import save_pretrained

__all__ = ["FAMILIES", "Pretrained", "UncheckedWarning", "load_pretrained", "save_pretrained"]
