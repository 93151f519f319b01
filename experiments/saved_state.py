"""A generation's context in a file: safetensors, with what it belongs to in its header."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from ..kernels.attention import cache
from . import checkpoint
from .loading import Loaded
from .sampling import Context, Generator

LAYOUT = "2"  # of what a file keeps of each block; 1 had a cache's tokens before its heads


def save(path: str, context: Context, loaded: Loaded, *, used: int, room: int) -> None:
    """Write the file whole or not at all. OSError if it cannot be written."""
    header = {"step": str(loaded.step), "weights": weights(loaded), "layout": LAYOUT}
    header |= {"used": str(used), "room": str(room), "rows": str(len(context.drawn))}
    new = Path(f"{path}.new")
    try:
        save_file(checkpoint.named(context), new, metadata=header)
        os.replace(new, path)
    except SafetensorError as error:  # its own kind for what the operating system says
        raise OSError(str(error)) from None
    finally:
        new.unlink(missing_ok=True)


def load(path: str, loaded: Loaded, generator: Generator) -> tuple[Context, int, int]:
    """The context, the tokens that it has read and has room for. ValueError if it does not fit."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file (one of --save-state is expected)")
    try:
        with safe_open(path, framework="flax") as file:
            header = file.metadata() or {}
            if "weights" not in header:
                raise ValueError(f"{path} is not a file of --save-state")
            if header.get("layout", "1") != LAYOUT:
                raise ValueError(
                    f"{path} was saved by another version of scanax, with states of layout "
                    f"{header.get('layout', '1')}, not {LAYOUT}: read the text again"
                )
            if header["weights"] != weights(loaded):
                step = header["step"]
                what = "another dtype" if step == "None" else f"step {step}"
                raise ValueError(
                    f"{path} was saved with other weights than those of {loaded.folder}: with "
                    f"{what} of this model, or of another"
                )
            used, room, rows = (int(header[name]) for name in ("used", "room", "rows"))
            generator.check(rows)
            context = jax.eval_shape(lambda: empty(generator, rows, room))
            leaves = [file.get_tensor(name) for name in checkpoint.named(context)]
    except SafetensorError as error:
        raise ValueError(f"{path} is not a file of --save-state, or cut off: {error}") from None
    found = jax.tree.unflatten(jax.tree.structure(context), leaves)
    state = tuple(map(fitting, found.state, context.state))  # saved on a mesh, or none, or another
    return jax.device_put(found._replace(state=state), generator.places), used, room


def fitting(state: Any, expected: Any) -> Any:
    """A block's state with a cache of the size that is expected here."""
    cached = isinstance(state, dict) and {"k", "v", "length"} <= state.keys()
    if not cached or state["k"].shape == expected["k"].shape:
        return state
    return cache.resized(state, expected["k"].shape[2])


def empty(generator: Generator, rows: int, room: int) -> Context:
    """A context that has read nothing."""
    return Context(
        generator.blank(rows, room),
        jnp.zeros((rows, generator.model.config.vocab), jnp.float32),
        jnp.zeros((rows, 2), jnp.uint32),
        jnp.zeros(rows, jnp.int32),
    )


def weights(loaded: Loaded) -> str:
    """What tells the checkpoint's weights from any others: the CRC-32s of its files."""
    if loaded.step is None:
        paths = [loaded.folder / "config.json", *sorted(loaded.folder.glob("*.safetensors"))]
        sums = {path.name: checkpoint.crc32(path) for path in paths}
        return f"{checkpoint.seal(sums | {'dtype': loaded.config.task.model.dtype}):08x}"
    files = checkpoint.manifest(loaded.folder.parent, loaded.step)["files"]
    return f"{checkpoint.seal(files):08x}"
