"""How many tokens a kernel takes at a time: what was measured on this kind of device, if anything.

`scanax.experiments.tune` writes the table; the implementations read it and have a default for what
it does not hold. An entry is of an operation, an implementation, a kind of device and the widths
and dtype of a call, never of its length.
"""

import contextlib
import contextvars
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from .dispatch import target

_asked: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar(
    "scanax_asked", default=None
)


def path() -> Path:
    """$SCANAX_TILES, or scanax/tiles.json in the user's cache."""
    if named := os.environ.get("SCANAX_TILES"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "scanax" / "tiles.json"


def key(op: str, implementation: str, kind: str, **features: object) -> str:
    """The name of an entry; `kind` is of the device."""
    about = " ".join(f"{name}={value}" for name, value in features.items())
    return f"{op} | {implementation} | {kind} | {about}"


def size(
    op: str,
    implementation: str,
    default: int,
    refuse: Callable[[int], str | None] = lambda number: None,
    **features: object,
) -> int:
    """The measured number of tokens on the device that calls are traced for, or the default.

    refuse(number) says why the implementation cannot take a number; ValueError if it is measured.
    """
    entry, asked = key(op, implementation, target().kind, **features), _asked.get()
    if asked is not None:
        asked[entry] = default
    if jax.process_count() > 1 and not os.environ.get("SCANAX_TILES"):
        return default  # hosts of one program read one table or none
    file = path()
    number = table(file).get(entry, default)
    if number != default and (reason := refuse(number)):
        raise ValueError(f"{file} has {number} for {entry!r}, but {reason}; tune it anew")
    return number


@contextlib.contextmanager
def record() -> Iterator[dict[str, int]]:
    """Collect the entries that calls traced inside the block look up, each with its default."""
    asked: dict[str, int] = {}
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@functools.lru_cache
def table(file: Path) -> dict[str, int]:
    """All entries of a file, read once a process; none if there is no file."""
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"the tile sizes of {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        entries = None
    if isinstance(entries, dict) and all(type(n) is int and n > 0 for n in entries.values()):
        return entries
    raise ValueError(f"{file} is not a table of tile sizes; delete it")
