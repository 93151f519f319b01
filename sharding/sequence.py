"""One sequence over many devices: each summarises its span, they exchange that, each runs once.

Time is contiguous on every device. `run` is the one place that enters shard_map for a mixer; what
is exchanged is a summary of the monoid, whose size does not grow with the sequence: LASP-2
(arXiv:2502.07563) for every mixer that has a state.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ..kernels.monoid import Element, Monoid, resettable
from . import mesh, schedule

Method = Literal["gather", "scan", "ring"]


def across(rule: Monoid, summary: Element, axis: str, method: Method = "gather") -> Element:
    """Inside shard_map: the combination of the summaries of all devices before this one.

    gather: one all-gather, P - 1 summaries received by each device (LASP-2). scan: ceil(log2 P)
    exchanges of one summary, one after the other. ring: one summary sent by each device, P - 1
    exchanges one after the other (LASP). The first device's is the identity. The backward passes
    exchange as much in the other direction. Raises ValueError for another method.
    """
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    nothing = rule.identity(summary)

    def where(condition, element, otherwise):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), element, otherwise)

    def shifted(element, pairs):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), element)

    if method == "gather":
        every = jax.tree.map(lambda x: jax.lax.all_gather(x, axis), summary)
        before = nothing
        for i in range(devices - 1):
            one = jax.tree.map(lambda x, i=i: x[i], every)
            before = rule.combine(before, where(i < here, one, nothing))
        return before
    if method == "scan":
        before, upto, distance = nothing, summary, 1
        while distance < devices:
            pairs = [(i, i + distance) for i in range(devices - distance)]
            earlier = where(here >= distance, shifted(upto, pairs), nothing)
            before, upto = rule.combine(earlier, before), rule.combine(earlier, upto)
            distance *= 2
        return before
    if method == "ring":
        before = nothing
        for i in range(devices - 1):
            passed = shifted(rule.combine(before, summary), [(i, i + 1)])
            before = where(here == i + 1, passed, before)
        return before
    raise ValueError(f"method={method!r} is not one of gather, scan, ring")


def last(tree: Any, axis: str) -> Any:
    """Inside shard_map: the last device's arrays, on every device of the axis."""
    end = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(end, x, jnp.zeros_like(x)), axis), tree)


def halo(window: Any, after: Any, axis: str) -> Any:
    """Inside shard_map: `after` of the device before this one; on the first, `window`."""
    devices = jax.lax.axis_size(axis)
    pairs = [(i, i + 1) for i in range(devices - 1)]
    first = jax.lax.axis_index(axis) == 0
    return jax.tree.map(
        lambda w, a: jnp.where(first, w, jax.lax.ppermute(a, axis, pairs)), window, after
    )


def gathered(tree: Any, axis: str) -> Any:
    """Inside shard_map: arrays (B, T, ...) with the time of all devices of the axis."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), tree)


def run(
    op: Callable,
    tokens: Any,
    shared: Any,
    state: Any,
    reset: Any,
    *,
    specs: tuple[Any, Any, Any, Any],
    summarize: Callable,
    monoid: Callable[[Any], Monoid],
    element: Callable[[Any], Element],
    value: Callable[[Element], Any],
) -> Any:
    """(outputs, state) of op(tokens, shared, state, reset) over the mesh in force.

    specs: PartitionSpecs of tokens, shared, state and outputs. `summarize(tokens, shared, reset,
    state)` is a span's element of resettable(monoid(shared)); `element(state)` and `value(element)`
    go from a state to the monoid's element and back. A single token is run by all devices of `seq`.
    Tokens are arrays (B, T, ...). Raises ValueError for a T that does not divide over `seq`.
    """
    length = jax.tree.leaves(tokens)[0].shape[1]
    spread = mesh.size("seq") > 1 and mesh.over_time(length) is not None

    def local(tokens, shared, state, reset):
        if spread:
            rule = resettable(monoid(shared))
            summary = summarize(tokens, shared, reset, state)
            start = jnp.zeros_like(summary[0]), element(state)
            before = across(rule, summary, "seq", schedule.in_force().states)
            _, entered = rule.combine(start, before)
            outputs, after = op(tokens, shared, value(entered), reset)
            return outputs, last(after, "seq")
        return op(tokens, shared, state, reset)

    marks = None if reset is None else lying(length)[0]
    return manual(local, (*specs[:3], marks), specs[3:] + specs[2:3])(tokens, shared, state, reset)


TIME = P(mesh.ROWS, "seq")  # arrays (B, T, ...)
HEADS = P(mesh.ROWS, "seq", "tensor")  # (B, T, H, ...)


def lying(length: int) -> tuple[P, P]:
    """TIME and HEADS for so many tokens: a single one lies on every device of `seq`.

    Raises ValueError for another length that does not divide over it.
    """
    axis = mesh.over_time(length)
    return P(mesh.ROWS, axis), P(mesh.ROWS, axis, "tensor")


def manual(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """shard_map over the mesh in force, all its axes that are not taken yet."""
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.free()),
        check_vma=False,
    )


def grouped(x: Float[Array, "B T G K"], heads: int) -> tuple[Array, P]:
    """x and how it lies over the axes: its groups over `tensor`, or one on every device.

    Groups that are fewer than the devices, and several, are repeated to one a head first. Raises
    ValueError for a time that does not divide over `seq`.
    """
    groups, parts = x.shape[2], mesh.size("tensor")
    whole, by_head = lying(x.shape[1])
    if groups == 1:
        return x, whole
    if groups % parts:
        x = jnp.repeat(x, heads // groups, axis=2)
    return x, by_head


def run_each(op: Callable, x: Any, shared: Any) -> Any:
    """op(x, shared), which takes each token of x (B, T, ...) alone: nothing is exchanged.

    Rows and time lie over the mesh in force, all else whole on every device. XLA, left to place
    an `op` that folds rows and time into one axis, would gather them first. Raises ValueError for
    rows or a time that do not divide over the mesh.
    """
    if not mesh.several():
        return op(x, shared)
    mesh.check(x.shape[0], x.shape[1])
    marks, _ = lying(x.shape[1])
    return manual(op, (marks, P()), marks)(x, shared)


def run_window(
    op: Callable, x: Any, shared: Any, window: Any, reset: Any, places: Any
) -> tuple[Any, Any]:
    """(y, window) of op(x, shared, window, reset), which looks back no further than the window.

    x (B, T, D) and the window (B, W, D), the last inputs before x, lie over the mesh in force with
    D over `tensor` if it divides; `places` are the PartitionSpecs of `shared` then. A halo of W
    rows is exchanged. Raises ValueError for rows or a time that do not divide over the mesh.
    """
    if not mesh.several():
        return op(x, shared, window, reset)
    (_, time, channels), past = x.shape, window.shape[1]
    mesh.check(x.shape[0], time)
    spread = past and mesh.size("seq") > 1 and mesh.over_time(time)

    def local(x, shared, window, reset):
        if not spread:
            return op(x, shared, window, reset)
        span, end = x.shape[1], None if reset is None else reset[:, -past:]
        if span < past:  # so few that the window reaches past the neighbour: all are read by all
            x, reset = gathered((x, reset), "seq")
            y, after = op(x, shared, window, reset)
            first = jax.lax.axis_index("seq") * span
            return jax.lax.dynamic_slice_in_dim(y, first, span, axis=1), after
        kept = window.dtype  # which may be coarser than what one neighbour tells the other
        window = window.astype(x.dtype)
        _, tail = op(x[:, -past:], shared, jnp.zeros_like(window), end)
        y, after = op(x, shared, halo(window, tail, "seq"), reset)
        return y, last(after, "seq").astype(kept)

    marks, tokens = lying(time)
    windows = P(mesh.ROWS, None, "tensor")
    if channels % mesh.size("tensor"):  # a few that all heads share lie whole on every device
        tokens, windows, places = marks, P(mesh.ROWS), P()
    specs = (tokens, places, windows, None if reset is None else marks)
    return manual(local, specs, (tokens, windows))(x, shared, window, reset)
