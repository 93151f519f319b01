"""Patterns of blocks: `"gla+swiglu*5,attention+swiglu"`, repeated to the depth of the model."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

MIXERS = ("gla", "retention", "vir", "lightning", "mamba", "mamba2", "aaren", "attention", "conv")
FRAMES = ("convs5", "convlstm")  # whose tokens are frames
MLPS = ("swiglu", "geglu", "gelu", "glu", "moe", "none")


class Kind(NamedTuple):
    """What one block is made of: names of its mixer and of its MLP."""

    mixer: str
    mlp: str


def parse(pattern: str, depth: int) -> tuple[Kind, ...]:
    """The blocks of `mixer[+mlp][*n]`, comma separated, repeated until there are `depth` of them.

    A mixer without `+mlp` stands alone, as `+none` does, and a mixer of frames always: its block
    has all that it needs. The last repetition may end early. Raises
    ValueError for an unknown name, an empty entry, a count below 1 and a pattern longer than depth.
    """
    if depth < 1:
        raise ValueError(f"depth={depth}; a model needs at least 1 block")
    period = [kind for entry in pattern.split(",") for kind in _entry(entry, pattern)]
    if len(period) > depth:
        raise ValueError(f"pattern {pattern!r} has {len(period)} blocks, more than {depth=}")
    return tuple(period[i % len(period)] for i in range(depth))


def written(blocks: Iterable[str]) -> str:
    """The pattern of blocks `mixer+mlp`, those that follow their like as `*n`."""
    runs = [(block, len(list(same))) for block, same in itertools.groupby(blocks)]
    return ",".join(block if count == 1 else f"{block}*{count}" for block, count in runs)


def _entry(entry: str, pattern: str) -> list[Kind]:
    block, star, count = (part.strip() for part in entry.partition("*"))
    mixer, plus, mlp = (part.strip() for part in block.partition("+"))
    if not mixer or (plus and not mlp):
        raise ValueError(f"{entry!r} in pattern {pattern!r} is incomplete; write mixer[+mlp][*n]")
    if mixer not in MIXERS + FRAMES:
        known = f"{', '.join(MIXERS)}, nor of frames {', '.join(FRAMES)}"
        raise ValueError(f"mixer {mixer!r} in pattern {pattern!r} is not one of {known}")
    if plus and mlp not in MLPS:
        raise ValueError(f"mlp {mlp!r} in pattern {pattern!r} is not one of {', '.join(MLPS)}")
    if star and not (count.isdecimal() and int(count) > 0):
        raise ValueError(f"count {count!r} in pattern {pattern!r} is not a whole number from 1 up")
    if mixer in FRAMES and mlp not in ("", "none"):
        raise ValueError(f"{entry!r} in pattern {pattern!r}: {mixer} stands alone, without +{mlp}")
    return [Kind(mixer, mlp or "none")] * int(count or 1)
