"""The body of every network: blocks in runs of like ones, and the norm after them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from ..kernels import checks, keep
from ..sharding import matmul, mesh, pipeline, schedule
from .block import norm, runs, stack, stream_dtype
from .config import BackboneConfig
from .pattern import FRAMES, imported, parse
from .states import blank, check

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": keep.POLICY,
}
BLOCK = "the output of a block"
# A pipeline keeps the same of each block, by one policy for all that a stage does in a tick.
PIPELINED = POLICIES | {"full": jax.checkpoint_policies.save_only_these_names(BLOCK)}


class Backbone(nnx.Module):
    """norm(blocks(x)): what a model has between what it reads and what it says.

    A state is a tuple with one entry a block, the mixer's own (None for attention that keeps no
    cache), whatever blocks are scanned together; batch is the leading axis of its leaves. A model
    without a state starts fresh; `reset` marks the tokens before which everything is forgotten. In
    a pipeline only a call with a state returns one. A key says that the model is being trained:
    what routers draw follows from it, and experts with a capacity drop tokens.
    """

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        for name in ("dtype", "param_dtype"):
            if (kind := getattr(config, name)) != jax.dtypes.canonicalize_dtype(kind).name:
                raise ValueError(f"{name}={kind} needs 64-bit types: set JAX_ENABLE_X64=1")
        for kind in set(parse(config.pattern, config.depth)):
            if kind.own:
                imported(kind.mixer)  # is it still what compiled programs know it as?
        self.config = config
        key = rngs.params()
        self.blocks = nnx.List([stack(config, run, key) for run in runs(config)])
        self.norm = nnx.data(None)
        if parse(config.pattern, config.depth)[-1].mixer not in FRAMES:  # they end with a norm
            self.norm = norm(config, jnp.dtype(config.dtype), rngs)

    def init_state(self, batch: int, max_length: int) -> tuple:
        """The state before any token; caches have room for `max_length` tokens."""
        checks.size("batch", batch)
        checks.size("max_length", max_length)
        return blank(self.config, batch, max_length)

    def mix(
        self,
        x: Float[Array, "B T *S D"],
        state: tuple | None = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T *S D"], tuple, dict[str, Array]]:
        """The stream x after the blocks and the norm, the state, and auxiliary values."""
        config = self.config
        checks.mask("reset", reset, x.shape[:2])
        if state is not None:
            check(config, x.shape[0], state)
        x = x.astype(stream_dtype(config))
        x = mesh.constrain(x, mesh.ENDS, matmul.stream(x))
        order = [run.layers for run in runs(config)]
        given = None
        if state is not None:
            given = [_stack([state[layer] for layer in layers]) for layers in order]
        structures, variables = zip(*map(nnx.split, self.blocks), strict=True)
        blocks = [(one, _keys(key, layers)) for one, layers in zip(variables, order, strict=True)]
        if config.pipeline == (1, 1):
            x, states, aux = self._part(structures, blocks, x, given, reset)
        else:
            x, states, aux = self._pipeline(structures, blocks, x, given, reset)
        each = {}
        for layers, after in zip(order, states, strict=True):
            each |= {layer: _layer(after, i) for i, layer in enumerate(layers)}
        x = x.astype(config.dtype) if self.norm is None else self.norm(x)
        return x, tuple(each[layer] for layer in range(config.depth)), _join(order, aux)

    def _pipeline(self, structures, blocks, x: Array, state: list | None, reset: Array | None):
        how, (stages, rounds) = schedule.in_force(), self.config.pipeline
        if mesh.size("pipe") != stages:
            raise ValueError(
                f"blocks stacked for pipe={stages} on a mesh of pipe={mesh.size('pipe')}"
            )

        def part(blocks, x, state, reset, microbatch):
            blocks = [(variables, _fold(keys, microbatch)) for variables, keys in blocks]
            x, after, aux = self._part(structures, blocks, x, state, reset)
            return x, None if state is None else after, aux

        many = {"rounds": rounds, "microbatches": how.microbatches or stages}
        policy = PIPELINED.get(self.config.remat)
        x, after, aux = pipeline.run(part, blocks, x, state, reset, policy=policy, **many)
        return x, [None] * len(structures) if after is None else after, aux

    def _part(self, structures, blocks, x: Array, state: list | None, reset: Array | None):
        """Run after run; states and auxiliary values of each lead with its layers."""
        state, after, aux = state or [None] * len(structures), [], []
        for run in zip(structures, blocks, state, strict=True):
            x, one, extra = self._run(*run, x, reset)
            after.append(one)
            aux.append(extra)
        return x, after, aux

    def _run(self, graphdef, block, state: Any, x: Array, reset: Array | None):
        """The layers of one run: a scan, unrolled where they are few, for a loop copies what each
        keeps for the backward pass into its place and out. Without one, which outside of jit is
        compiled in every call: a layer by itself, and one token after a state, as a loop would
        copy the states too."""
        length = jax.tree.leaves(block)[0].shape[0]
        alone = length == 1 or (state is not None and x.shape[1] == 1)

        def body(x, layer):
            (variables, key), state = layer
            key = None if key is None else jax.random.wrap_key_data(key)
            x, state, aux = nnx.merge(graphdef, variables)(x, state, reset, key)
            x = checkpoint_name(x, BLOCK)
            return mesh.constrain(x, mesh.ROWS, matmul.stream(x)), (state, aux)

        if self.config.remat != "none" and self.config.pipeline == (1, 1):
            # a loop already keeps the recomputation from being merged with the first one
            body = jax.checkpoint(body, policy=POLICIES[self.config.remat], prevent_cse=alone)
        if alone:
            rest = []
            for i in range(length):
                x, one = body(x, _layer((block, state), i))
                rest.append(one)
            return x, *_stack(rest)
        # A loop recomputes (remat) and gathers (on a mesh) for one layer at a time: unrolled both
        # take more memory. Outside of jit it is compiled sooner.
        copies = self.config.remat == "none" and mesh.size(*mesh.AXES) == 1
        few = copies and length <= self.config.unroll and isinstance(x, Tracer)
        x, (after, aux) = jax.lax.scan(body, x, (block, state), unroll=few)
        return x, after, aux


def made_from(config: Any, kind: type[Any], rngs: Any) -> None:
    """Raise a ValueError unless a model is made from a config of its kind and random streams."""
    if not isinstance(config, kind):
        raise ValueError(f"config is a {type(config).__name__}; it must be a {kind.__name__}")
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs is a {type(rngs).__name__}; it must be flax.nnx.Rngs(seed)")


def _keys(key: Array | None, layers: tuple[int, ...]) -> Array | None:
    """A key's data for each layer, by the layer's number."""
    if key is None:
        return None
    each = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array(layers, jnp.uint32))
    return jax.random.key_data(each)


def _fold(keys: Array | None, number: Array) -> Array | None:
    if keys is None:
        return None
    each = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys), number)
    return jax.random.key_data(each)


def _stack(layers: list) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _layer(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def _join(order: list[tuple[int, ...]], aux: list[dict[str, Array]]) -> dict[str, Array]:
    """Auxiliary values of all runs, one entry a layer that has them, in the layers' order."""
    found: dict[str, dict[int, Array]] = {}
    for layers, each in zip(order, aux, strict=True):
        for name, values in each.items():
            found.setdefault(name, {}).update(zip(layers, values, strict=True))
    return {name: jnp.stack([v for _, v in sorted(one.items())]) for name, one in found.items()}
