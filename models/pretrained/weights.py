"""The tensors of a directory of safetensors files, read one at a time, and written."""

import json
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from . import options
from .options import shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64", "F32", "F16", "BF16"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# In a file's metadata, as JSON: each tensor's CRC-32, and config.json's options.
CHECKSUMS, OPTIONS = "crc32", "config"


class UncheckedWarning(UserWarning):
    """Weights without checksums: damage that leaves finite numbers cannot be seen."""


class Weights:
    """The tensors by name: their shapes, and `read`, which takes one from the disk.

    `options` are those of config.json when save_pretrained wrote the files, or None. Raises
    ValueError for what is not a complete set of safetensors files; nothing is unpickled.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Path] = {}
        self._checksums: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.options: dict[str, Any] | None = None
        listed = _listed(directory)
        for path in sorted(set(listed.values())) if listed else [directory / SINGLE]:
            self._open(path)
        if missing := [name for name in listed if name not in self.shapes]:
            raise ValueError(f"{INDEX} names {shown(missing)}, not in {listed[missing[0]].name}")
        if listed and (more := [name for name in self.shapes if name not in listed]):
            raise ValueError(f"{INDEX} does not name {shown(more)}")
        if not self.shapes:
            raise ValueError(f"{SINGLE} holds no tensors")

    @property
    def numbers(self) -> int:
        """How many numbers the largest tensor has."""
        return max(int(np.prod(shape, dtype=object)) for shape in self.shapes.values())

    def warn_unchecked(self) -> None:
        without = [name for name in self.shapes if name not in self._checksums]
        if without:
            warnings.warn(
                f"{self.directory}: {len(without)} tensors have no checksums: damage that leaves "
                "numbers finite goes unseen (save_pretrained writes them)",
                UncheckedWarning,
                stacklevel=4,  # of who called load_pretrained
            )

    def read(self, name: str, rows: Any = slice(None), dtype: Any = None) -> np.ndarray:
        """Some rows of a tensor. ValueError if it was changed on the disk or is not finite."""
        code = self._checksums.get(name)
        part = code is None and isinstance(rows, slice) and self.shapes[name]
        # opened each time, because the pages of an open file stay in memory
        with safe_open(self._files[name], framework="numpy") as file:
            x = file.get_slice(name)[rows] if part else file.get_tensor(name)
        if not part:
            if code is not None and _crc32(x) != code:
                raise ValueError(f"{self.directory}: {name} was changed: its checksum differs")
            x = x[rows]
        with np.errstate(over="ignore"):  # infinite then, which is refused
            x = x.astype(dtype or x.dtype, copy=False)
        if not np.isfinite(x).all():
            raise ValueError(f"{self.directory}: {name} holds numbers not finite in {x.dtype}")
        return x

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as file:
                names, about = file.keys(), file.metadata() or {}
                parts = ((name, file.get_slice(name)) for name in names)
                kinds = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in parts}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path.name} is no safetensors file: {_reason(path, error)}"
            ) from None
        for name, (dtype, shape) in kinds.items():
            if name in self._files:
                raise ValueError(f"{shown([name])} is in two files")
            if dtype not in DTYPES:
                known = ", ".join(sorted(DTYPES))
                raise ValueError(f"{path.name}: {shown([name])} is of {dtype}; read are {known}")
            self.shapes[name], self._files[name] = shape, path
        if CHECKSUMS in about:
            sums = _mapping(path, about, CHECKSUMS)
            if sums.keys() != kinds.keys():
                raise ValueError(f"{path.name}: its checksums are not those of its tensors")
            self._checksums |= sums
        if OPTIONS in about:
            self.options = _mapping(path, about, OPTIONS)


def write(
    directory: Path,
    sizes: dict[str, int],
    get: Callable[[str], Any],
    most: int,
    values: dict[str, Any],
) -> None:
    """Write tensors of so many bytes into files of at most `most` each, with checksums.

    get(name) makes one; the tensors of one file are in memory at a time. values: the options that
    the numbers mean something with. Raises ValueError for numbers that are not finite.
    """
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    where: dict[str, str] = {}
    for i, names in enumerate(files):
        many = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys(names, SINGLE if len(files) == 1 else many)
        tensors = {name: np.ascontiguousarray(get(name)) for name in names}
        if wrong := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
            raise ValueError(f"not written, for its numbers are not finite: {shown(wrong)}")
        sums = {name: _crc32(x) for name, x in tensors.items()}
        about = {"format": "pt", CHECKSUMS: json.dumps(sums), OPTIONS: json.dumps(values)}
        save_file(tensors, directory / where[names[0]], metadata=about)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _crc32(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def _mapping(path: Path, about: dict[str, str], name: str) -> dict[str, Any]:
    """A mapping in a file's metadata."""
    try:
        values = json.loads(about[name])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: its metadata were changed: {name} is no mapping")
    return values


def _listed(directory: Path) -> dict[str, Path]:
    """The file of each tensor by the index; empty where there is one file."""
    single = (directory / SINGLE).is_file()
    if not (directory / INDEX).is_file():
        if single:
            return {}
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"it has {shown(pickles[:1])}, which is pickled and would run code when read; "
                "docs/checkpoints.md says how to convert it to safetensors"
            )
        raise ValueError(f"it has neither {SINGLE} nor {INDEX}")
    files = options.read(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{INDEX} has no weight_map")
    for name, file in files.items():
        if not (isinstance(file, str) and re.fullmatch(r"[\w.\-]+\.safetensors", file)):
            where = json.dumps(file)[:80]
            raise ValueError(f"{INDEX}: {shown([name])} is in {where}, no safetensors file here")
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise ValueError(f"it has no {file}, which {INDEX} names")
    if single and SINGLE not in files.values():
        raise ValueError(f"it has {SINGLE} and an {INDEX} that does not name it; remove one")
    return {name: directory / file for name, file in files.items()}


def _reason(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as refused:  # which safetensors may take for a file that is not there
        return str(refused)
    if start == b"vers":
        return "it is the pointer that Git LFS leaves in its place; `git lfs pull` fetches it"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it is pickled, as torch.save does; docs/checkpoints.md says how to convert it"
    return shown([str(error)])
