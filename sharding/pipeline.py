"""A pipeline: blocks in stages over the axis pipe, microbatches that go from one to the next.

Megatron-LM's interleaved schedule (arXiv:2104.04473) in one compiled loop. Of rounds x stages
equal parts of a model, stage r holds the parts r, r + stages, ...: a microbatch goes round the
ring of stages that often. In tick t stage r does its item t - r and passes the result on; items
are ordered so that what a stage needs has just arrived. The backward pass is the transposed loop.
Of rounds * microbatches + stages - 1 ticks a stage is idle in stages - 1, each way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from . import matmul, mesh

# What only moves numbers is done again for the backward pass: else each tick would keep a copy of
# the weights that it took from their stack.
MOVES = {"dynamic_slice", "gather", "slice", "squeeze", "reshape", "transpose", "broadcast_in_dim"}
MOVES |= {"convert_element_type"}


def ticks(stages: int, rounds: int, microbatches: int) -> int:
    """Ticks of the loop."""
    return rounds * microbatches + stages - 1


def item(number: Any, stages: int, rounds: int) -> tuple[Any, Any]:
    """(round, microbatch) of a stage's item: as many microbatches as stages go round together."""
    group, rest = number // (stages * rounds), number % (stages * rounds)
    return rest // stages, group * stages + rest % stages


def check(rows: int, microbatches: int) -> None:
    """Raise a ValueError for rows or microbatches that do not divide over the mesh in force."""
    mesh.divide("microbatches", microbatches, "pipe")
    over = {axis: mesh.size(axis) for axis in mesh.ROWS} | {"microbatches": microbatches}
    if rows % (mesh.size(*mesh.ROWS) * microbatches):
        raise ValueError(f"rows={mesh.refusal(rows, over, 'parts')}")


def run(
    part: Callable,
    weights: Any,
    x: Float[Array, "B T *S D"],
    state: Any,
    reset: Bool[Array, "B T"] | None,
    *,
    rounds: int,
    microbatches: int,
    policy: Callable | None = None,
) -> tuple[Float[Array, "B T *S D"], Any, Any]:
    """(y, state, aux): x through part(weights, x, state, reset, microbatch) -> (x, state, aux).

    Leaves of weights lead with stages * rounds * n, of state with stages * rounds * n, B, by stage,
    then by round; a part gets those of its n blocks. A state that is None stays None. `aux` is the
    mean over the microbatches, its leaves leading as the weights'. Rows lie over `mesh.ENDS`.
    `policy` says what of a part is kept for the backward pass (None: all that is computed).
    """
    stages = mesh.size("pipe")
    check(x.shape[0], microbatches)
    devices = mesh.size(*mesh.ROWS)

    def cut(a, axis):
        """Rows as microbatches, which lead, of rows: none leaves its data-parallel device."""
        shape = a.shape[:axis], a.shape[axis], a.shape[axis + 1 :]
        split = (devices, microbatches, shape[1] // devices // microbatches)
        a = jnp.moveaxis(a.reshape(*shape[0], *split, *shape[2]), axis + 1, 0)
        return a.reshape(microbatches, *shape[0], shape[1] // microbatches, *shape[2])

    def joined(a, axis):
        """The inverse of `cut`."""
        shape = a.shape[1 : axis + 1], a.shape[axis + 1], a.shape[axis + 2 :]
        a = a.reshape(microbatches, *shape[0], devices, shape[1] // devices, *shape[2])
        a = jnp.moveaxis(a, 0, axis + 1)
        return a.reshape(*shape[0], shape[1] * microbatches, *shape[2])

    def computed(primitive, *_, **__):
        return primitive.name not in MOVES

    @partial(jax.checkpoint, policy=policy or computed, prevent_cse=False)
    def one(weights, number, *rest):
        if rounds == 1:  # no copy of them in every tick
            return part(jax.tree.map(lambda w: w[0], weights), *rest)
        return part(jax.tree.map(lambda w: w[number], weights), *rest)

    def local(weights, x, state, reset):
        here, last = jax.lax.axis_index("pipe"), stages - 1
        # float32, for XLA's CPU compiler dies of sums in bfloat16 here, and the gradient is one
        dtype, exact = x.dtype, jnp.promote_types(jnp.float32, x.dtype)
        whole = partial(jax.lax.all_gather, axis_name="pipe", tiled=True)
        x, reset = jax.tree.map(whole, (x.astype(exact), reset))
        x = x.astype(dtype)
        weights = jax.tree.map(lambda w: w.reshape(rounds, -1, *w.shape[1:]), weights)
        # (rounds, microbatches, n, rows, ...)
        state = jax.tree.map(lambda s: cut(s.reshape(rounds, -1, *s.shape[1:]), 2), state)
        state = jax.tree.map(lambda s: jnp.moveaxis(s, 0, 1), state)
        begin = jax.tree.map(lambda s: s[0, 0], state)
        first = None if reset is None else reset[0]
        shapes = jax.eval_shape(one, weights, 0, x[0], begin, first, 0)
        aux = jax.tree.map(lambda a: jnp.zeros((rounds, *a.shape), a.dtype), shapes[2])

        def tick(carry, t):
            arrived, outputs, state, aux = carry
            number = t - here
            busy = (number >= 0) & (number < rounds * microbatches)
            turn, i = item(jnp.clip(number, 0, rounds * microbatches - 1), stages, rounds)
            inputs = jnp.where((here == 0) & (turn == 0), x[i], arrived)
            before = jax.tree.map(lambda s: s[turn, i], state)
            resets = None if reset is None else reset[i]
            y, after, extra = one(weights, turn, inputs, before, resets, i)
            done = busy & (here == last) & (turn == rounds - 1)
            outputs = outputs.at[i].set(jnp.where(done, y, outputs[i]))
            if state is not None:
                kept = jax.tree.map(partial(jnp.where, busy), after, before)
                state = jax.tree.map(lambda s, k: s.at[turn, i].set(k), state, kept)
            aux = jax.tree.map(lambda a, e: a.at[turn].add(jnp.where(busy, e, 0)), aux, extra)
            onward = [(stage, (stage + 1) % stages) for stage in range(stages)]
            return (jax.lax.ppermute(y, "pipe", onward), outputs, state, aux), None

        carry = jnp.zeros_like(x[0]), jnp.zeros_like(x), state, aux
        steps = jnp.arange(ticks(stages, rounds, microbatches), dtype=jnp.int32)
        (_, y, state, aux), _ = jax.lax.scan(tick, carry, steps)
        # the last stage's outputs, each stage a share of the microbatches
        y = jnp.where(here == last, y, 0).astype(exact)
        y = jax.lax.psum_scatter(y, "pipe", scatter_dimension=0, tiled=True).astype(dtype)
        state = jax.tree.map(lambda s: joined(jnp.moveaxis(s, 1, 0), 2), state)
        state = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), state)
        aux = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]) / microbatches, aux)
        return y, state, aux

    x, reset = jax.tree.map(lambda a: cut(a, 0), (x, reset))
    stacked = P("pipe")
    y, state, aux = jax.shard_map(
        local,
        in_specs=(stacked, stacked, stacked, stacked),
        out_specs=(stacked, stacked, stacked),
        axis_names={"pipe"},
        check_vma=False,
    )(weights, x, state, reset)
    y = joined(y, 0)
    return mesh.constrain(y, mesh.ENDS, matmul.stream(y)), state, aux
