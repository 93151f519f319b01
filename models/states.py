"""A model's state: one entry a block, the mixer's own, batch the leading axis of its leaves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding import mesh
from .block import abstract, runs
from .config import BackboneConfig


def blank(config: BackboneConfig, batch: int, max_length: int) -> tuple:
    """The state of every block before any token."""
    dtype, states = jnp.dtype(config.dtype), {}
    for run in runs(config):
        # a mixer may read its variables' shapes, which are those of one layer here
        mixer = nnx.merge(*abstract(config, run.kind, run.layers[0])).mixer
        for layer in run.layers:
            states[layer] = mixer.init_state(batch, max_length, dtype)
    return tuple(states[layer] for layer in range(config.depth))


def check(config: BackboneConfig, batch: int, state: Any) -> None:
    """Raise a ValueError for a state that is not of this model and as many rows."""
    if not isinstance(state, tuple | list):
        raise ValueError(f"state is a {type(state).__name__}, not a tuple as init_state makes")
    if len(state) != config.depth:
        raise ValueError(f"state has {len(state)} entries; the model has {config.depth} blocks")
    expected = _shapes(config, batch, mesh.size("seq"))
    for layer, (given, (structure, leaves)) in enumerate(zip(state, expected, strict=True)):
        if given is None and leaves:
            raise ValueError(
                "state is of a call without one, where attention keeps no cache; begin with "
                "init_state"
            )
        if jax.tree.structure(given) != structure:
            raise ValueError(
                f"state's entry {layer} is not of this model's block {layer}; begin with init_state"
            )
        for (path, x), shape in zip(jax.tree.leaves_with_path(given), leaves, strict=True):
            if len(x.shape) != len(shape) or any(
                n != m for n, m in zip(x.shape, shape, strict=True) if m is not None
            ):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                wanted = ", ".join("..." if m is None else str(m) for m in shape)
                raise ValueError(
                    f"state's entry {layer} has {name} of shape {x.shape}, not ({wanted}): it is "
                    "of another batch or model; begin with init_state"
                )


@functools.lru_cache(maxsize=64)
def _shapes(config: BackboneConfig, batch: int, devices: int) -> list[tuple[Any, list]]:
    """Of each block's state the structure, and the shapes, None where they go by max_length.

    Caches are rounded up to a multiple of the devices along seq.
    """
    lengths = devices, 2 * devices
    few, many = (jax.eval_shape(lambda n=n: blank(config, batch, n)) for n in lengths)
    found = []
    for low, high in zip(few, many, strict=True):
        pairs = zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True)
        shapes = [
            tuple(n if n == m else None for n, m in zip(a.shape, b.shape, strict=True))
            for a, b in pairs
        ]
        found.append((jax.tree.structure(low), shapes))
    return found
