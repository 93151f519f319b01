"""Reading checkpoints, and what one is. Orbax v1 holds the arrays; `saving` writes them.

A run's directory holds one folder a step, named by its number, each complete in itself:

    100/state/...       the arrays by name, as Orbax writes them (`ocp.load` reads the folder too)
    100/config.json     what rebuilds the model, and any further files given (a tokenizer.json)
    100/manifest.json   step, metric, metadata, every array's type, every file's size and CRC-32

A folder gets its number by one rename once all of it is written, so a number means complete. Orbax
does not notice a changed byte in the arrays; the CRC-32s do, and are checked before anything loads.
"""

import contextlib
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

MANIFEST = "manifest.json"
OTHER = "give the config that it was saved with"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; `previous` is the step to try instead, or None."""

    def __init__(self, message: str, previous: int | None = None):
        super().__init__(message)
        self.previous = previous


class Restored(NamedTuple):
    step: int
    state: Any
    metadata: dict[str, Any]


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints, rising; none if there is no such directory."""
    if not os.path.isdir(directory):
        return []
    return sorted(int(n) for n in os.listdir(directory) if re.fullmatch(r"0|[1-9]\d*", n))


def latest(directory: str | os.PathLike[str]) -> int:
    """The last complete step. CheckpointError if `directory` holds no checkpoint."""
    if not os.path.isdir(directory):
        raise CheckpointError(f"checkpoint {directory}: no such directory")
    found = steps(directory)
    if not found:
        reason = "it holds no folder named by a step"
        if Path(directory, MANIFEST).is_file():
            at = Path(directory).absolute()
            reason = f"it is one checkpoint; name {at.parent} and step {at.name}"
        raise CheckpointError(f"{directory} is no checkpoint directory: {reason}")
    return found[-1]


def best(directory: str | os.PathLike[str]) -> int | None:
    """The step with the lowest metric (the earlier of equals); None if none was saved with one."""
    found = []
    for step in steps(directory):
        with contextlib.suppress(CheckpointError):  # a damaged one is not the best
            found.append((manifest(directory, step)["metric"], step))
    finite = [(m, step) for m, step in found if m is not None and math.isfinite(m)]
    return min(finite, default=(None, None))[1]


def manifest(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """What manifest.json says of the checkpoint: step, metric, metadata, arrays and files."""
    folder = Path(directory, str(step))
    if not folder.is_dir():
        has = ", ".join(map(str, steps(directory))) or "none"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has: {has}")
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())
        if sealed["crc32"] == seal(sealed["manifest"]):
            return sealed["manifest"]
        reason = f"{MANIFEST} was changed"
    except FileNotFoundError:
        reason = f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        reason = f"{MANIFEST} was changed or cut short"
    raise _damaged(folder, reason)


def mark(directory: str | os.PathLike[str], step: int, metric: float | None) -> None:
    """Put the metric, measured later, into the checkpoint of `step`; whole or not at all."""
    about = manifest(directory, step) | {"metric": metric}
    write_manifest(Path(directory, str(step)), about)


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    new = folder / f"{MANIFEST}.new"
    new.write_text(json.dumps({"crc32": seal(about), "manifest": about}, indent=1), "utf-8")
    os.replace(new, folder / MANIFEST)


def load_config(directory: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The config saved beside the arrays, without reading them; of the latest step by default."""
    return json.loads(load_file(directory, "config.json", step))


def load_file(directory: str | os.PathLike[str], name: str, step: int | None = None) -> str:
    """The text of a file that was saved into the checkpoint."""
    step = latest(directory) if step is None else step
    files = manifest(directory, step)["files"]
    if name not in files:
        raise CheckpointError(f"checkpoint {Path(directory, str(step))} has no file {name}")
    _verify(Path(directory, str(step)), {name: files[name]})
    return Path(directory, str(step), name).read_text(encoding="utf-8")


def restore(
    directory: str | os.PathLike[str], target: Any, step: int | None = None, *, part: bool = False
) -> Restored:
    """The state saved at `step` (None: the latest), in the structure and shardings of `target`.

    target: a pytree of jax.ShapeDtypeStruct or arrays; where a leaf has no sharding it comes to the
    first device. part: the target may name some of the arrays only. CheckpointError if the folder
    is damaged (with `previous`, the step before) or does not hold what the target asks for.
    """
    step = latest(directory) if step is None else step
    about, folder = manifest(directory, step), Path(directory, str(step)).absolute()
    _verify(folder, about["files"])
    wanted, saved = named(target), about["arrays"]
    for name, leaf in wanted.items():
        here = [str(leaf.dtype), list(leaf.shape)]
        if name not in saved:
            raise CheckpointError(f"checkpoint {folder} has no {name}: {OTHER}")
        if saved[name] != here:
            raise CheckpointError(
                f"checkpoint {folder}: {name} is {_shown(saved[name])} there, {_shown(here)} here: "
                f"{OTHER}"
            )
    if not part and (more := [name for name in saved if name not in wanted]):
        raise CheckpointError(f"checkpoint {folder} has {more[0]}, not asked for: {OTHER}")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = {n: getattr(leaf, "sharding", None) or device for n, leaf in wanted.items()}
    # Orbax wants every name it holds; arrays without elements it never held.
    asked: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        if (leaf := wanted.get(name)) is not None
        else ocp.PLACEHOLDER
        for name, (_, shape) in saved.items()
        if 0 not in shape
    }
    loaded = ocp.load(str(folder), asked)
    leaves = [
        loaded[n] if n in loaded else jnp.zeros(leaf.shape, leaf.dtype, device=shardings[n])
        for n, leaf in wanted.items()
    ]
    state = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return Restored(step, state, about["metadata"])


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree of arrays by their paths' names: {"params.embedding": array}."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"two leaves of the state are both named {name}")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(f"{name} is a {type(leaf).__name__}; a state's leaves are arrays")
        leaves[name] = leaf
    return leaves


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def seal(body: dict[str, Any]) -> int:
    """CRC-32 of a manifest's contents, whatever their layout in the file."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _verify(folder: Path, files: dict[str, list[int]]) -> None:
    for name, (size, code) in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != size:
            raise _damaged(folder, f"{name} has {path.stat().st_size} bytes of {size}")
        if crc32(path) != code:
            raise _damaged(folder, f"the contents of {name} were changed")


def _damaged(folder: Path, reason: str) -> CheckpointError:
    step = int(folder.name)
    previous = max((s for s in steps(folder.parent) if s < step), default=None)
    offer = (
        f"the one before it is of step {previous}: --step {previous}"
        if previous is not None
        else "there is none before it"
    )
    return CheckpointError(f"checkpoint {folder} is damaged: {reason}; {offer}", previous)


def _shown(kind: list[Any]) -> str:
    return f"{kind[0]}{kind[1]}"
