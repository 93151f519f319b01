"""A published directory, or one of the Hub, as a model."""

import dataclasses
import os
import re
from functools import partial
from pathlib import Path
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
from ..layout import assembled, put, shapes, split
from ..lm import LM
from . import options
from .compare import difference
from .families import FAMILIES, config_of, kind_of
from .options import shown
from .pieces import by_name, their_shapes, to_ours
from .weights import Weights

DTYPES = ("float32", "bfloat16")


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
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r} is no mesh; sharding.mesh.make makes one of a text")
    over = meshes.make(devices=jax.devices()[:1]) if mesh is None else mesh
    found = Pretrained(directory, dtype)
    config = dataclasses.replace(  # any vocabulary, though it be cut over devices
        found.config, pipeline=(over.shape["pipe"], 1), vocab_multiple=over.shape["tensor"]
    )

    def build(rngs):
        return LM(config, rngs=rngs)

    _, blank, _ = split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return assembled(build, found.params(config, partition.shardings(config, blank, over)), over)


class Pretrained:
    """A directory in which a model was found: its config now, its parameters when asked for."""

    def __init__(self, directory: str | Path, dtype: DTypeLike = "float32"):
        try:
            kept = str(jnp.dtype(dtype))
        except TypeError:
            kept = str(dtype)
        if kept not in DTYPES:
            raise ValueError(f"dtype={kept}; it can be {' or '.join(DTYPES)}")
        self.folder = folder_of(directory)
        values = options.read(self.folder / "config.json")
        try:
            self.kind = kind_of(values)
            self.family = FAMILIES[self.kind]
            self.weights = Weights(self.folder)
            options.same(values, self.weights.options)
            held = self.weights.shapes
            config = config_of(self.kind, values, self.weights.numbers, len(held), held)
            self.config = dataclasses.replace(config, dtype=kept, param_dtype=kept)
            pieces = self.family.pieces(self.config, self.kind)
            self.pieces = [piece.among(held) for piece in pieces]
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


def _stack(layers):
    return jnp.stack(layers)


def folder_of(directory: str | Path) -> Path:
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
