"""A model as plain pytrees: for the training step, for checkpoints, for the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .block import runs
from .config import LMConfig


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], Any]:
    """(graphdef, parameters as a nested dict of arrays, everything else)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), rest


def merge(graphdef: nnx.GraphDef, params: dict[str, Any], rest: Any) -> nnx.Module:
    """The inverse of `split`."""
    return nnx.merge(graphdef, params, rest)


def by_layer(config: LMConfig, params: dict[str, Any]) -> dict[str, Any]:
    """`{"embedding": ..., "layers.0.mixer.q.kernel": ...}`: names that do not know about runs.

    Takes any tree built like the parameters (gradients, Adam's moments); this is the layout of
    checkpoints. Under `jax.eval_shape` it maps shapes.
    """
    flat = {}
    for name, tree in params.items():
        if name != "blocks":
            flat |= _flatten(tree, name)
            continue
        for index, run in enumerate(runs(config)):
            for path, stacked in _flatten(tree.get(index, {})).items():
                for i in range(run.length):
                    flat[f"layers.{run.start + i}.{path}"] = stacked[i]
    return flat


def from_layers(config: LMConfig, flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `by_layer`. Raises ValueError if a layer's leaf is missing or left over."""
    blocks: dict[str, dict[int, Any]] = {}
    params: dict[str, Any] = {}
    for name, leaf in flat.items():
        if name.startswith("layers."):
            _, layer, path = name.split(".", 2)
            blocks.setdefault(path, {})[int(layer)] = leaf
        else:
            _put(params, name.split("."), leaf)
    params["blocks"] = {}
    for index, run in enumerate(runs(config)):
        layers = range(run.start, run.start + run.length)
        params["blocks"][index] = {}
        for path, leaves in blocks.items():
            present = [i for i in layers if i in leaves]
            if present and len(present) < run.length:
                missing = min(set(layers) - set(present))
                raise ValueError(f"layers.{missing}.{path} is missing")
            if present:
                stacked = jnp.stack([leaves.pop(i) for i in layers])
                _put(params["blocks"][index], path.split("."), stacked)
    left = [f"layers.{i}.{path}" for path, leaves in blocks.items() for i in leaves]
    if left:
        raise ValueError(f"{left[0]} is not a parameter of a model of {config.depth} blocks")
    return params


def decayed(params: dict[str, Any]) -> dict[str, Any]:
    """True where weight decay applies: leaves named `kernel` or `embedding`.

    Not to norms, biases, decays (A_log, dt's bias), skips (D) or rotation angles.
    """

    def applies(path, _):
        return path[-1].key in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(applies, params)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _put(tree: dict[str, Any], path: list[str], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
