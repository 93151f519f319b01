"""Finding the files of a corpus and reading their documents."""

import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Not on every machine (Debian packages them apart, or a later Python dropped them), generated, or
# not Python's own. Tests go too: they are often not installed, and mostly tables of cases.
NOT_STDLIB = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"),
    *("idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"),
    *("config-*", "_sysconfigdata_*"),
)


def find(names: Sequence[str], suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(relative name, path) of each file, in an order that does not depend on the machine."""
    found: list[tuple[str, Path]] = []
    for name in names:
        if name == "stdlib":
            root = Path(os.__file__).parent
            files = list(_walk(root, (".py",), NOT_STDLIB))
        else:
            root = Path(name)
            if not root.exists():
                raise ValueError(f"corpus {name}: no such file or directory")
            files = list(_walk(root, suffixes, ())) if root.is_dir() else [root]
        if not files:
            raise ValueError(f"corpus {name} is empty: it holds no file to read")
        top = root if root.is_dir() else root.parent
        found += sorted((f.relative_to(top).as_posix(), f) for f in files)
    return found


def _walk(root: Path, suffixes: Sequence[str], without: Sequence[str]) -> Iterator[Path]:
    """Files under `root`: none hidden, no file or folder that a pattern of `without` fits."""

    def wanted(name: str) -> bool:
        return not (name.startswith(".") or any(fnmatch.fnmatch(name, w) for w in without))

    for folder, folders, files in os.walk(root):
        folders[:] = filter(wanted, folders)
        for name in filter(wanted, files):
            if not suffixes or name.endswith(tuple(suffixes)):
                yield Path(folder, name)


def read(files: Sequence[tuple[str, Path]], field: str) -> Iterator[tuple[str, str]]:
    """(key, text) of each document: a file, or a row of a .jsonl, whose key has its number too."""
    for key, path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text (byte {error.start}); in a directory, --data.suffixes "
                "chooses the files to read"
            ) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if path.suffix == ".jsonl":
            for row, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield f"{key}:{row}", _field(line, field, f"{path} line {row}")
        else:
            yield key, text


def _field(line: str, field: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} has no text field {field!r}; it has: {has}")
    return row[field]
