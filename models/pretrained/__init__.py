"""Published checkpoints: directories of safetensors and config.json, read and written.

A family is a file here with `read` (their options to our config), `write` (the way back), `pieces`
(which numbers of their tensors are which of ours) and `BUFFERS` (what they store besides, which
nobody needs); with `buffers` where their loader wants them all the same, and `HEAD` where that has
a name of its own. `FAMILIES` has it under what config.json calls its kind of model.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ...sharding import mesh as meshes
from .. import partition
from ..block import runs
from ..config import LMConfig
from ..layout import by_layer, put, shapes, split
from ..lm import LM
from . import fla, jamba, llama, mamba, mamba2, minimax, options, torchscale, transnormer
from .compare import difference
from .options import Options
from .pieces import by_name, their_shapes, to_ours, to_theirs
from .weights import UncheckedWarning, Weights, shown, write

__all__ = ["FAMILIES", "Pretrained", "UncheckedWarning", "load_pretrained", "save_pretrained"]

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "mixtral": llama,
    "qwen2_moe": llama,
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "minimax": minimax,
    "gla": fla,
    "retnet": fla,
    "torchscale": torchscale,
    "transnormer": transnormer,
}
DTYPES = ("float32", "bfloat16")
KEPT = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "vocab*", "merges.txt")


def load_pretrained(
    directory: str | Path, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None
) -> LM:
    """The model in a directory: `logits, state = model(tokens)`.

    directory: one with config.json and safetensors, or a Hub id `owner/name` (extra `hub`).
    dtype: float32 or bfloat16, of the parameters and of the computation. mesh: that of
    `sharding.mesh.make` onto which it is read, tensor by tensor; None: the first device. Raises
    ValueError, in one line, for options that are not supported, tensors that are missing, left
    over or of another shape, damaged files and numbers that are not finite. Warns
    (`UncheckedWarning`) of weights that carry no checksums.
    """
    over = meshes.make(devices=jax.devices()[:1]) if mesh is None else mesh
    found = Pretrained(directory, dtype)
    config = dataclasses.replace(found.config, pipeline=(over.shape["pipe"], 1))
    graphdef, blank, _ = split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
    params = found.params(config, partition.shardings(config, blank, over))

    def others():  # decays by depth and the like; the parameters' draws are dead code
        return nnx.split(LM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)[2]

    rest = jax.jit(others, out_shardings=meshes.sharding(over))()
    return nnx.merge(graphdef, params, rest)


class Pretrained:
    """A directory in which a model was found: its config now, its parameters when asked for."""

    def __init__(self, directory: str | Path, dtype: DTypeLike = "float32"):
        try:
            kept = str(jnp.dtype(dtype))
        except TypeError:
            kept = str(dtype)
        if kept not in DTYPES:
            raise ValueError(f"dtype={kept}; it can be {' or '.join(DTYPES)}")
        self.folder = _folder(directory)
        values = options.read(self.folder / "config.json")
        try:
            self.kind = _kind(values)
            self.family = FAMILIES[self.kind]
            self.weights = Weights(self.folder)
            options.same(values, self.weights.options)
            config = _config(self.kind, values, self.weights.numbers, len(self.weights.shapes))
            self.config = dataclasses.replace(config, dtype=kept, param_dtype=kept)
            pieces = self.family.pieces(self.config, self.kind)
            self.pieces = [piece.among(self.weights.shapes) for piece in pieces]
            self._check()
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json beside the weights."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def params(self, config: LMConfig, places: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a model of `config`, each where `places` says.

        They are read layer by layer: besides what is done the host holds one layer of one
        parameter, and the devices the layers of one parameter once more.
        """
        if changed := difference(config, self.config):
            raise ValueError(f"{self.folder} holds another model: {changed}")
        self.weights.warn_unchecked()
        pieces, dtype = by_name(self.pieces, "ours"), jnp.dtype(config.param_dtype)
        sizes = shapes(config)

        def one(name, where):
            x = to_ours(pieces[name], partial(self.weights.read, dtype=dtype))
            if x.shape != sizes[name]:  # rows that pad the vocabulary
                x = np.pad(x, [(0, n - m) for n, m in zip(sizes[name], x.shape, strict=True)])
            return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

        def run(names, where):
            each = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
            layers = [one(name, each) for name in names]  # gone before the next are read
            return jax.block_until_ready(jax.jit(_stack, out_shardings=where)(layers))

        params: dict[str, Any] = {}
        for path, where in jax.tree_util.tree_leaves_with_path(places):
            keys = [part.key for part in path]
            if keys[0] == "blocks":
                layers = runs(config)[keys[1]].layers
                leaf = run([".".join(["layers", str(i), *keys[2:]]) for i in layers], where)
            else:
                leaf = one(".".join(keys), where)
            put(params, keys, leaf)
        return params

    def _check(self) -> None:
        """ValueError for tensors missing, left over or of another shape: names first, for shapes
        take a while."""
        have, names = self.weights.shapes, by_name(self.pieces, "theirs")
        if missing := [name for name in names if name not in have]:
            raise ValueError(f"missing tensors: {shown(missing)}")
        more = [n for n in have if n not in names and not re.fullmatch(self.family.BUFFERS, n)]
        head = getattr(self.family, "HEAD", "lm_head.weight")
        tied = self.config.tie_head and head in more
        if tied:
            more.remove(head)
        if more:
            raise ValueError(f"tensors left over: {shown(more)}")
        wanted = their_shapes(self.pieces, shapes(self.config))
        if wrong := [name for name in wanted if have[name] != wanted[name]]:
            name = wrong[0]
            raise ValueError(
                f"tensors of another shape than config.json says: {shown(wrong)}; {name} has "
                f"{have[name]}, not {wanted[name]}"
            )
        if tied:
            name = next(piece.theirs for piece in self.pieces if piece.ours == "embedding")
            if not np.array_equal(self.weights.read(name), self.weights.read(head)):
                raise ValueError(f"config.json says that {head} is {name}, but it is not")


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
    directory = Path(os.path.expanduser(directory)).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty; choose another")
    example = None if like is None else _folder(like)
    kept = {} if example is None else options.read(example / "config.json")
    kind, values = _written(model.config, family or (_kind(kept) if kept else None), kept)
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


def _stack(layers):
    return jnp.stack(layers)


def _kind(values: dict[str, Any]) -> str:
    """The family, by what config.json calls it."""
    kind = values.get("model_type")
    if kind is None and "decoder_retention_heads" in values:
        kind = "torchscale"
    if not (isinstance(kind, str) and kind in FAMILIES):
        value = json.dumps(kind)[:80]
        raise ValueError(f"config.json: model_type={value} is not one of {', '.join(FAMILIES)}")
    return kind


def _config(kind: str, values: dict[str, Any], *bounds: int) -> LMConfig:
    """Our config of theirs, with every option understood."""
    asked = Options(values, *bounds)
    config = FAMILIES[kind].read(asked)
    asked.skip("model_type")
    asked.done()
    return config


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
            reason = difference(config, _config(kind, values))
        except ValueError as error:
            reason = str(error)
        if reason is None:
            return kind, values
        reasons[kind] = reason
    why = "; ".join(f"{kind} would be {reason}" for kind, reason in reasons.items())
    raise ValueError(f"no layout has words for this model: {why}")


def _folder(directory: str | Path) -> Path:
    """A directory here, or one fetched from the Hub by its id."""
    path = Path(os.path.expanduser(directory))
    if not path.is_dir():
        path = _fetched(directory)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json")
    return path


def _fetched(directory: str | Path) -> Path:
    """Where a checkpoint of the Hub lies here: its safetensors and JSON, nothing that runs."""
    word = r"[A-Za-z0-9][\w.-]*"
    if os.path.lexists(directory) or not re.fullmatch(f"{word}/{word}", str(directory)):
        raise ValueError(f"{shown([str(directory)])}: no such directory")
    try:
        from huggingface_hub import snapshot_download  # an extra
    except ImportError:
        raise ValueError(
            f"{directory}: no such directory; to fetch it from the Hub: pip install 'scanax[hub]'"
        ) from None
    try:
        return Path(
            snapshot_download(str(directory), allow_patterns=["*.json", "model*.safetensors"])
        )
    except Exception as error:  # of the network, of the Hub, of its cache
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{directory}: no such directory, and the Hub says: {reason}") from None
