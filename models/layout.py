"""A model as plain pytrees: for the training step, for checkpoints, for the optimizer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ..kernels import routing
from ..sharding import mesh
from .block import runs
from .config import BackboneConfig
from .lm import LM
from .pattern import parse


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], Any]:
    """(graphdef, parameters as a nested dict of arrays, everything else)."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), rest


def merge(graphdef: nnx.GraphDef, params: dict[str, Any], rest: Any) -> nnx.Module:
    """The inverse of `split`."""
    return nnx.merge(graphdef, params, rest)


def assembled(build: Callable[[nnx.Rngs], nnx.Module], params: Any, over: Mesh) -> Any:
    """The module that `build` makes, with parameters that lie on a mesh in the place of its own."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def others():  # decays by depth and the like; the parameters' draws are dead code
        return nnx.split(build(nnx.Rngs(0)), nnx.Param, ...)[2]

    rest = jax.jit(others, out_shardings=mesh.sharding(over))()
    return nnx.merge(graphdef, params, rest)


def by_layer(config: BackboneConfig, params: dict[str, Any]) -> dict[str, Any]:
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
                for i, layer in enumerate(run.layers):
                    flat[f"layers.{layer}.{path}"] = stacked[i]
    return flat


def from_layers(
    config: BackboneConfig, flat: dict[str, Any], kind: type[Any] = LM
) -> dict[str, Any]:
    """The inverse of `by_layer` for a model of this kind.

    ValueError names a leaf that is missing, left over or of another shape.
    """
    known = shapes(config, kind)
    for name in known | flat:
        if name not in flat:
            raise ValueError(f"{name} is missing")
        if name not in known:
            raise ValueError(f"{name} is not a parameter of a model of {config.depth} blocks")
        if flat[name].shape != known[name]:
            raise ValueError(f"{name} has shape {flat[name].shape}; the model's is {known[name]}")
    params: dict[str, Any] = {"blocks": {}}
    for name, leaf in flat.items():
        if not name.startswith("layers."):
            put(params, keys(name), leaf)
    for index, run in enumerate(runs(config)):
        params["blocks"][index] = {}
        first = f"layers.{run.layers[0]}."
        for path in [name.removeprefix(first) for name in known if name.startswith(first)]:
            leaves = [flat[f"layers.{layer}.{path}"] for layer in run.layers]
            put(params["blocks"][index], keys(path), jnp.stack(leaves))
    return params


@functools.lru_cache(maxsize=16)
def shapes(config: BackboneConfig, kind: type[Any] = LM) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of `by_layer` for a model of this kind."""
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    flat = jax.eval_shape(functools.partial(by_layer, config), split(model)[1])
    return {name: leaf.shape for name, leaf in flat.items()}


def decayed(params: dict[str, Any]) -> dict[str, Any]:
    """True where weight decay applies: matrices of projections and experts, and the embedding.

    Not to norms, biases, decays (A_log, dt's bias), skips (D) or rotation angles.
    """

    def applies(path, _):
        return path[-1].key in ("kernel", "embedding", "gate", "up", "down", "noise", "vectors")

    return jax.tree_util.tree_map_with_path(applies, params)


def rebalanced(config: BackboneConfig, params: dict[str, Any], load: Any) -> dict[str, Any]:
    """The parameters after a step: biases of routers, where there are any, move against the load.

    `load` (layers with experts, experts) are shares of a step's assignments.
    """
    if config.moe.router.kind != "sigmoid":
        return params
    kinds = parse(config.pattern, config.depth)
    places = [layer for layer, kind in enumerate(kinds) if kind.mlp == "moe"]
    move = functools.partial(routing.rebalanced, rate=config.moe.router.bias_rate)
    blocks = dict(params["blocks"])
    for index, run in enumerate(runs(config)):
        if run.kind.mlp != "moe":
            continue
        mlp = blocks[index]["mlp"]
        loads = jnp.stack([load[places.index(layer)] for layer in run.layers])
        bias = jax.vmap(move)(mlp["router"]["bias"], loads)
        mlp = mlp | {"router": mlp["router"] | {"bias": bias}}
        blocks[index] = blocks[index] | {"mlp": mlp}
    return params | {"blocks": blocks}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def keys(name: str) -> list[str | int]:
    """The path of a name, whose numbers are places of a list."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def put(tree: dict[Any, Any], path: Sequence[Any], leaf: Any) -> None:
    """Set the leaf at a path of keys, making the dicts on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
