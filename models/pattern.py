"""Patterns of blocks: `"gla+swiglu*5,attention+swiglu"`, repeated to the depth of the model."""

import importlib
import inspect
import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

MIXERS = ("gla", "retention", "vir", "lightning", "mamba", "mamba2", "aaren", "attention", "conv")
FRAMES = ("convs5", "convlstm")  # whose tokens are frames
MLPS = ("swiglu", "geglu", "gelu", "glu", "moe", "none")


class Kind(NamedTuple):
    """What one block is made of: names of its mixer and of its MLP."""

    mixer: str
    """One of MIXERS or FRAMES, or `module:Class` for one of another file."""
    mlp: str

    @property
    def own(self) -> bool:
        """Whether its mixer is one of somebody's own."""
        return ":" in self.mixer

    @property
    def role(self) -> str:
        """What the mixer is called in the names of parameters."""
        return self.mixer.rpartition(":")[2].lower()


def parse(pattern: str, depth: int) -> tuple[Kind, ...]:
    """The blocks of `mixer[+mlp][*n]`, comma separated, repeated until there are `depth` of them.

    A mixer that is not the library's own is `module:Class`, which Python imports (see `imported`).
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


FOUND: dict[str, Any] = {}  # what a name meant before: programs that were compiled know it so


def imported(mixer: str) -> Any:
    """The class that `module:Class` names: a layer such as those of `scanax.layers`.

    It is built as Class(width, depth=, dtype=, param_dtype=, rngs=) and has `__call__(x, state,
    reset) -> (y, state)` and `init_state`. Raises ValueError if there is none, or another than
    before.
    """
    module, _, name = mixer.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        advice = f"; the folder of {module} belongs on PYTHONPATH" if missing else ""
        raise ValueError(f"mixer {mixer!r} cannot be imported: {error}{advice}") from None
    if not isinstance(found, type) or not hasattr(found, "init_state"):
        raise ValueError(
            f"mixer {mixer!r}: {module} has no class {name} with __call__(x, state, reset) and "
            "init_state(batch, max_length, dtype)"
        )
    try:
        kinds = {"depth": None, "dtype": None, "param_dtype": None, "rngs": None}
        inspect.signature(found.__init__).bind(None, 8, **kinds)
    except TypeError as error:
        called = f"{name}(width, depth=, dtype=, param_dtype=, rngs=)"
        raise ValueError(f"mixer {mixer!r} is built as {called}: {error}") from None
    if FOUND.setdefault(mixer, found) is not found:
        raise ValueError(
            f"mixer {mixer!r} was another class before: start Python anew, or name it otherwise"
        )
    return found


def _entry(entry: str, pattern: str) -> list[Kind]:
    block, star, count = (part.strip() for part in entry.partition("*"))
    mixer, plus, mlp = (part.strip() for part in block.partition("+"))
    if not mixer or (plus and not mlp):
        raise ValueError(f"{entry!r} in pattern {pattern!r} is incomplete; write mixer[+mlp][*n]")
    if mixer not in MIXERS + FRAMES and not re.fullmatch(r"\w+(\.\w+)*:\w+", mixer):
        known = f"{', '.join(MIXERS)}, nor of frames {', '.join(FRAMES)}, nor module:Class"
        raise ValueError(f"mixer {mixer!r} in pattern {pattern!r} is not one of {known}")
    if plus and mlp not in MLPS:
        raise ValueError(f"mlp {mlp!r} in pattern {pattern!r} is not one of {', '.join(MLPS)}")
    if star and not (count.isdecimal() and int(count) > 0):
        raise ValueError(f"count {count!r} in pattern {pattern!r} is not a whole number from 1 up")
    if mixer in FRAMES and mlp not in ("", "none"):
        raise ValueError(f"{entry!r} in pattern {pattern!r}: {mixer} stands alone, without +{mlp}")
    return [Kind(mixer, mlp or "none")] * int(count or 1)
