"""Where parameters lie: strict rules from names to PartitionSpecs."""

import math
import re
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from .mesh import refusal

Rules = Sequence[tuple[str, PartitionSpec]]


def match(rules: Rules, name: str) -> PartitionSpec:
    """The spec of the first rule whose pattern is the whole name. ValueError if none is."""
    for pattern, spec in rules:
        if re.fullmatch(pattern, name):
            return spec
    raise ValueError(
        f"no rule says where the parameter {name} lies; "
        "a mixer of your own names it in its attribute `places`"
    )


def check(name: str, shape: Sequence[int], spec: PartitionSpec, sizes: dict[str, int]) -> None:
    """Raise a ValueError that names a parameter whose size does not divide over its axis."""
    for size, place in zip(shape, spec, strict=False):
        axes = (place,) if isinstance(place, str) else place or ()
        over = {axis: sizes[axis] for axis in axes}
        if size % math.prod(over.values()):
            raise ValueError(f"{name} of shape {tuple(shape)}: {refusal(size, over)}")
