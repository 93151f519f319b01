"""The body of every network: blocks in runs of like ones, scanned, and the norm after them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..kernels import keep
from ..sharding import matmul, mesh, pipeline, schedule
from .block import abstract, norm, runs, stack, stream_dtype
from .config import BackboneConfig
from .pattern import FRAMES, parse

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
        self.config = config
        key = rngs.params()
        self.blocks = nnx.List([stack(config, run, key) for run in runs(config)])
        self.norm = nnx.data(None)
        if parse(config.pattern, config.depth)[-1].mixer not in FRAMES:  # they end with a norm
            self.norm = norm(config, jnp.dtype(config.dtype), rngs)

    def init_state(self, batch: int, max_length: int) -> tuple:
        """The state before any token; caches have room for `max_length` tokens."""
        dtype, states = jnp.dtype(self.config.dtype), {}
        for run in runs(self.config):
            # a mixer may read its variables' shapes, which are those of one layer here
            mixer = nnx.merge(*abstract(self.config, run.kind, run.layers[0])).mixer
            for layer in run.layers:
                states[layer] = mixer.init_state(batch, max_length, dtype)
        return tuple(states[layer] for layer in range(self.config.depth))

    def mix(
        self,
        x: Float[Array, "B T *S D"],
        state: tuple | None = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T *S D"], tuple, dict[str, Array]]:
        """The stream x after the blocks and the norm, the state, and auxiliary values."""
        config = self.config
        if state is not None and len(state) != config.depth:
            raise ValueError(f"state has {len(state)} entries; the model has {config.depth} blocks")
        if state is not None and any(entry is None for entry in state):
            raise ValueError(
                "state is of a call without one, where attention keeps no cache; "
                "begin with init_state"
            )
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
        """Scan over the layers of one run; of a single token after a state one after the other, for
        a scan would copy each layer's state into its place and back."""
        length = jax.tree.leaves(block)[0].shape[0]
        unrolled = length == 1 or (state is not None and x.shape[1] == 1)

        def body(x, layer):
            (variables, key), state = layer
            key = None if key is None else jax.random.wrap_key_data(key)
            x, state, aux = nnx.merge(graphdef, variables)(x, state, reset, key)
            x = checkpoint_name(x, BLOCK)
            return mesh.constrain(x, mesh.ROWS, matmul.stream(x)), (state, aux)

        if self.config.remat != "none" and self.config.pipeline == (1, 1):
            # the scan already keeps the recomputation from being merged with the first one
            body = jax.checkpoint(body, policy=POLICIES[self.config.remat], prevent_cse=unrolled)
        if unrolled:
            rest = []
            for i in range(length):
                x, one = body(x, _layer((block, state), i))
                rest.append(one)
            return x, *_stack(rest)
        x, (after, aux) = jax.lax.scan(body, x, (block, state))
        return x, after, aux


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
