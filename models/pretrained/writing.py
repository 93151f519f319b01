"""A model as a directory that the original library loads."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import LMConfig
from ..layout import by_layer, shapes, split
from ..lm import LM
from . import options
from .compare import difference
from .families import FAMILIES, config_of, kind_of
from .pieces import by_name, their_shapes, to_theirs
from .reading import folder_of
from .weights import write

KEPT = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "vocab*", "merges.txt")


def save_pretrained(
    model: LM,
    directory: str | Path,
    *,
    family: str | None = None,
    like: str | Path | None = None,
    most: int = 5 * 10**9,
) -> None:
    """Write a directory that the original library loads: config.json and safetensors.

    family: the kind of model to write, a key of `FAMILIES`; None: that of `like`, or else the
    first that can say what the model is. like: a directory whose further options and tokenizer
    files are kept. most: bytes of one file. Parameters are written in the dtype that they are kept
    in. Raises ValueError if the family has no words for the model, FileExistsError if the directory
    is there and not empty.
    """
    if not isinstance(model, LM):
        raise ValueError(f"model is a {type(model).__name__}; only an LM has a published layout")
    directory = Path(os.path.expanduser(directory)).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; choose another")
    example = None if like is None else folder_of(like)
    kept = {} if example is None else options.read(example / "config.json")
    kind, values = _written(model.config, family or (kind_of(kept) if kept else None), kept)
    _, params, _ = split(model)
    flat = by_layer(model.config, jax.tree.map(_Late, params))
    # rows that pad the vocabulary have no meaning elsewhere
    known = shapes(dataclasses.replace(model.config, vocab_multiple=1, pipeline=(1, 1)))

    def ours(name):
        return flat[name].get()[tuple(slice(n) for n in known[name])]

    layout = FAMILIES[kind]
    pieces = by_name(layout.pieces(model.config, kind), "theirs")
    wanted = their_shapes([piece for each in pieces.values() for piece in each], known)
    buffers = layout.buffers(model.config) if hasattr(layout, "buffers") else {}

    def theirs(name):
        return buffers[name] if name in buffers else to_theirs(pieces[name], wanted[name], ours)

    new = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        item = jnp.dtype(model.config.param_dtype).itemsize
        sizes = {name: item * math.prod(shape) for name, shape in wanted.items()}
        sizes |= {name: x.nbytes for name, x in buffers.items()}
        write(new, sizes, theirs, most, values)
        for path in (p for pattern in KEPT for p in example.glob(pattern)) if example else ():
            if path.is_file():
                shutil.copy(path, new)
        (new / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        new.replace(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


class _Late:
    """An array on the devices, or one of its layers, that comes to the host when asked for."""

    def __init__(self, x: jax.Array, layer: int | None = None):
        self.x, self.layer = x, layer

    def __getitem__(self, layer: int) -> "_Late":
        return _Late(self.x, layer)

    def get(self) -> np.ndarray:
        return np.asarray(jax.device_get(self.x if self.layer is None else self.x[self.layer]))


def _written(
    config: LMConfig, family: str | None, kept: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The family and its config.json; ValueError if it describes another function."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    reasons = {}
    for kind in FAMILIES if family is None else [family]:
        try:
            named = {"model_type": kind, "dtype": config.param_dtype}
            values = kept | named | FAMILIES[kind].write(config, kind)
            reason = difference(config, config_of(kind, values))
        except ValueError as error:
            reason = str(error)
        if reason is None:
            return kind, values
        reasons[kind] = reason
    why = "; ".join(f"{kind} would be {reason}" for kind, reason in reasons.items())
    raise ValueError(f"no layout has words for this model: {why}")
