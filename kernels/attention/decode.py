"""Stream-K: one query's attention over many keys, dealt evenly to workers (arXiv:2405.10480).

The tiles of keys that the outputs have to read, laid end to end, are cut into as many runs of equal
length as there are workers, across the borders of outputs: a long row does not wait for a short
one. A worker leaves a partial softmax state for each output that it touches, in slot
output + worker: along the line of tiles neither falls, and at each border one of them rises, so no
two partials share a slot and there are outputs + workers - 1 of them. The partials of an output lie
in order; merging them is a scan of the softmax monoid that restarts at each output.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .. import monoid


class Schedule(NamedTuple):
    """What each worker does at each step, and whose the partials are."""

    output: Int[Array, "W steps"]
    tile: Int[Array, "W steps"]
    slot: Int[Array, "W steps"]
    live: Bool[Array, "W steps"]
    """False past the end of a worker's run: its other entries then repeat the last step's."""
    starts: Bool[Array, "W steps"]
    """Whether a partial begins at this step."""
    used: Bool[Array, "slots"]
    begins: Bool[Array, "slots"]
    """Whether a slot is the first of its output."""
    last: Int[Array, "O"]
    """The slot of each output's last partial; -1 for an output that reads nothing."""


def partition(low: Int[Array, "O"], high: Int[Array, "O"], workers: int, most: int) -> Schedule:
    """Deal tiles [low, high) of each output, at most `most` each, in runs that differ by one."""
    outputs = low.shape[0]
    counts = jnp.maximum(high - low, 0).astype(jnp.int32)
    end = jnp.cumsum(counts, dtype=jnp.int32)
    total = end[-1]
    worker = jnp.arange(workers + 1, dtype=jnp.int32)
    bounds = worker * (total // workers) + jnp.minimum(worker, total % workers)
    steps = jnp.arange(-(-outputs * most // workers), dtype=jnp.int32)

    number = bounds[:-1, None] + steps
    live = number < bounds[1:, None]
    number = jnp.clip(jnp.minimum(number, bounds[1:, None] - 1), 0, None)
    output = jnp.searchsorted(end, number, side="right").astype(jnp.int32)
    output = jnp.minimum(output, outputs - 1)
    tile = low[output] + number - (end - counts)[output]
    slot = output + worker[:-1, None]
    fresh = jnp.concatenate([jnp.full_like(live[:, :1], True), slot[:, 1:] != slot[:, :-1]], axis=1)
    starts = live & fresh

    slots = outputs + workers - 1
    nowhere = jnp.where(live, slot, slots)
    used = jnp.zeros(slots, bool).at[nowhere].set(True, mode="drop")
    opens = live & (number == (end - counts)[output])
    begins = jnp.zeros(slots, bool).at[jnp.where(opens, slot, slots)].set(True, mode="drop")
    closes = live & (number == end[output] - 1)
    last = jnp.full(outputs, -1, jnp.int32)
    last = last.at[jnp.where(closes, output, outputs)].set(slot, mode="drop")
    return Schedule(output, tile, slot, live, starts, used, begins, last)


def merge(schedule: Schedule, partials: Any) -> Any:
    """(m, u, w) of every slot, leading axis slots -> those of every output, in a fixed order."""
    rule = monoid.resettable(monoid.SOFTMAX)
    empty = monoid.SOFTMAX.identity(partials)
    partials = monoid.select(schedule.used, partials, empty)
    none = jax.tree.map(lambda x: x[0], (jnp.zeros_like(schedule.begins), empty))
    _, states = monoid.associative(rule, (schedule.begins, partials), none)
    merged = jax.tree.map(lambda x: x[schedule.last], states)
    nothing = jax.tree.map(lambda x: x[: schedule.last.shape[0]], empty)
    nothing = jax.tree.map(lambda e, x: jnp.broadcast_to(e[:1], x.shape), nothing, merged)
    return monoid.select(schedule.last < 0, nothing, merged)
