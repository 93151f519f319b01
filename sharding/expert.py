"""Experts over devices: tokens travel to them by all-to-all, or their weights to the tokens.

The devices of the axes expert and tensor are one group of W, over which the hidden features of all
E experts lie one after the other: a device holds E / W experts, or one of G = W / E slices of one.
How a layer is computed then is a matter of `schedule` alone (Tutel, arXiv:2206.03382), for nothing
that is kept moves. `expert_degree` r: 0 gathers all weights and sends no token; r >= 1 sends each
token to r slices of its expert, each gathered from G / r devices that share its tokens out.
`expert_slices` cuts what is sent, so that one part travels while another is computed. `expert_node`
sends within nodes first, then between them.

Dropless: what one device sends another has room of a few sizes (`expert_ladder`) that are compiled
once. The load says which one runs; one that is too large for the last goes in several rounds.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ..kernels import keep, routing
from ..kernels.slots import collect, inverse, take
from . import exchange, matmul, mesh, schedule
from .sequence import manual

GROUP = ("expert", "tensor")
KERNEL, BIAS = P(GROUP, "fsdp"), P(GROUP)  # (E F, D) and (E F,)
GATHERED = "experts' weights of several devices"
# They are gathered once more for the backward pass: else a device would hold those of all layers.
KEPT = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)


class Layout(NamedTuple):
    """How the experts of one layer lie over a group of devices, and how they are reached."""

    devices: int = 1
    experts: int = 1
    degree: int = 0
    slices: int = 1
    node: int = 1

    @property
    def parts(self) -> int:
        """G, the devices that one expert lies over."""
        return max(self.devices // self.experts, 1)

    @property
    def local(self) -> int:
        """Experts, or slices of one, that a device computes."""
        return max(self.experts // self.devices, 1) if self.degree else self.experts

    @property
    def replicas(self) -> int:
        """Devices that compute the same slice, each for a share of its tokens."""
        return self.parts // self.degree if self.degree else 1

    @property
    def bins(self) -> int:
        """Places that a token may be sent to, each `degree` devices."""
        return self.devices // self.degree if self.degree else 1


def layout(experts: int, hidden: int) -> Layout:
    """The layout on the mesh and by the schedule in force. ValueError if it cannot be."""
    sizes, how = {axis: mesh.size(axis) for axis in GROUP}, schedule.in_force()
    devices = math.prod(sizes.values())
    if devices == 1:
        return Layout(experts=experts)
    if experts % devices and devices % experts:
        raise ValueError(f"experts={mesh.refusal(experts, sizes)}")
    found = Layout(devices, experts, how.expert_degree, how.expert_slices, how.expert_node)
    if hidden % found.parts:
        raise ValueError(f"hidden={mesh.refusal(hidden, {'slices': found.parts}, 'of an expert')}")
    if found.degree and found.parts % found.degree:
        known = ", ".join(str(r) for r in range(1, found.parts + 1) if found.parts % r == 0)
        raise ValueError(
            f"schedule.expert_degree={found.degree}: {experts} experts over {devices} devices are "
            f"cut into {found.parts} slices; 0, {known} would do"
        )
    if devices % found.node:
        raise ValueError(
            f"schedule.expert_node={found.node} does not divide {devices} devices of the axes "
            f"{' and '.join(GROUP)}"
        )
    return found


def run(
    compute: Callable[[Array, Array, dict[str, Array]], Array],
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    kernels: dict[str, Array],
    experts: int,
    *,
    bias: Float[Array, "E D"] | None = None,
    capacity: float = 0.0,
    scores: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """y_t = sum over k of weights_tk (compute(x_t, expert chosen_tk) + its bias), share dropped.

    kernels are (E F, D) and biases (E F,). compute(x, sizes, kernels) gets those of a device, as
    (experts, F, D) and (experts, F), and rows of x sorted by expert, of which there are
    `sizes`; its sum over slices of F is what the expert makes of them. A chosen expert of E is
    none. With a `capacity` factor an expert takes no more than `routing.capacity` of each device's
    tokens, first choices before second ones, then by descending `scores`, or by order if that is
    None; 0 drops none.

    Sums are in at least float32, y in x's dtype. ValueError for sizes that do not fit the mesh.
    """
    hidden = next(iter(kernels.values())).shape[0] // experts
    place = functools.partial(
        _local, compute, layout(experts, hidden), capacity=capacity, ladder=()
    )
    choice = chosen, weights, None if scores is None else scores[..., None]
    if not mesh.several():
        return place(x, choice, kernels, bias)
    mesh.check(x.shape[0], x.shape[1])
    stream = matmul.stream(x)
    cut = (stream,) if isinstance(stream, str) else stream or ()
    tokens, every = P(mesh.ROWS, stream), tuple(mesh.free())
    lying = {name: KERNEL if w.ndim == 2 else BIAS for name, w in kernels.items()}
    same = tuple(axis for axis in ("seq", "tensor") if axis not in cut and mesh.size(axis) > 1)
    local = functools.partial(
        place, same=same, every=every, ladder=schedule.in_force().expert_ladder
    )
    specs = (tokens, tokens, lying, P()), (tokens, P())
    return manual(local, *specs)(x, choice, kernels, bias)


def _local(
    compute, plan, x, choice, kernels, bias, *, capacity, ladder, same=(), every=()
) -> tuple[Array, Array]:
    """One device's tokens; those that the devices along `same` have in common they share out."""
    shape, count = x.shape, x.shape[0] * x.shape[1]
    x, choice = jax.tree.map(lambda a: a.reshape(count, -1), (x, choice))
    if same:
        fills = 0, (plan.experts, 0, None if choice[2] is None else 0)
        x, choice = jax.tree.map(functools.partial(_share, axes=same), (x, choice), fills)
    (chosen, weights, scores), tokens = choice, x.shape[0]
    most = tokens  # of one expert
    if capacity:
        most = min(most, routing.capacity(tokens, plan.experts, chosen.shape[1], capacity))
    trip = _trip(plan, most, chosen, scores)
    rooms, holds = _rooms(plan, tokens, most, chosen.shape[1], ladder)
    branches = tuple(functools.partial(_there_and_back, compute, plan, room) for room in rooms)

    def used(x, kernels, trip):
        kernels = {name: _gathered(plan, w, x.dtype) for name, w in kernels.items()}
        if holds and len(rooms) == 1:
            return branches[0]((x, kernels), trip, 0)
        load = jax.lax.pmax(trip.sizes.reshape(plan.bins, -1).sum(axis=1).max(), every)
        rung = (load > jnp.array(rooms[:-1], jnp.int32)).sum(dtype=jnp.int32)
        return _one_of(branches, rooms[-1], rung, load, (x, kernels), trip)

    if any(_gathers(plan, w.ndim) for w in kernels.values()):
        used = jax.checkpoint(used, policy=KEPT)
    y: Any = used(x, kernels, trip)
    weights = jnp.where(trip.kept, weights, 0)
    y = jnp.einsum("nkd,nk->nd", y.astype(weights.dtype), weights, precision="highest")
    if bias is not None:
        each = jax.nn.one_hot(chosen, plan.experts, dtype=weights.dtype)
        each = jnp.einsum("nk,nke->ne", weights, each, precision="highest")
        y = y + jnp.matmul(each, bias.astype(y.dtype), precision="highest")
    y = y.astype(x.dtype)
    if same:
        y = jax.lax.all_gather(y, same, axis=0, tiled=True)[:count]
    dropped = jnp.zeros((), jnp.float32)
    if capacity:
        asked = (chosen < plan.experts).sum(dtype=jnp.int32)
        counts = jnp.stack([asked - trip.sizes.sum(dtype=jnp.int32), asked])
        lost, asked = jax.lax.psum(counts, every) if every else counts
        dropped = lost / jnp.maximum(asked, 1).astype(jnp.float32)
    return y.reshape(shape), dropped


def _rooms(plan, tokens, most, k, ladder) -> tuple[list[int], bool]:
    """How much room a bin may have, ascending, and whether the last holds whatever is chosen."""
    if plan.degree == 0:
        return [tokens * k], True
    worst = min(tokens * k, -(-most // plan.replicas) * plan.local)
    even = tokens * k / plan.bins
    wanted = {min(math.ceil(even * factor), worst) for factor in ladder} or {worst}
    return sorted({-(-room // plan.slices) * plan.slices for room in wanted}), worst in wanted


def _share(x, fill, axes):
    """This device's of equal parts of the rows, filled up to as many as divide."""
    ways = mesh.size(*axes)
    each = -(-x.shape[0] // ways)
    x = jnp.pad(x, ((0, each * ways - x.shape[0]), (0, 0)), constant_values=fill)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * each, each)


class Trip(NamedTuple):
    """Where the assignments of one device's tokens go."""

    kept: Array
    """Which of them (n, k) go anywhere."""
    lanes: Array
    """The bin of each (n, k), and within it the expert."""
    position: Array
    """Of each (n, k), sorted by lane; those that are not kept have any."""
    sizes: Array
    """How many there are of each lane."""


def _trip(plan, most, chosen, scores) -> Trip:
    order = jnp.zeros(chosen.shape, jnp.float32) if scores is None else scores
    order = jnp.broadcast_to(order, chosen.shape)
    by = "order" if scores is None else "score"
    ranks = routing.ranks(chosen, order, plan.experts, by=by)
    kept = (chosen < plan.experts) & (ranks < most)
    # an expert's tokens are dealt out to its replicas
    lanes = jnp.where(kept, chosen * plan.replicas + ranks % plan.replicas, 0)
    each = jnp.arange(plan.experts, dtype=jnp.int32)
    of_expert = kept[..., None] & (chosen[..., None] == each)
    of_expert = of_expert.sum(axis=(0, 1), dtype=jnp.int32)
    dealt = jnp.arange(plan.replicas, dtype=jnp.int32)
    sizes = (of_expert[:, None] - dealt + plan.replicas - 1) // plan.replicas
    sizes = sizes.reshape(-1)
    return Trip(kept, lanes, _starts(sizes)[lanes] + ranks // plan.replicas, sizes)


def _starts(sizes, axis=0):
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


def _there_and_back(compute, plan, room, floats, trip, first):
    """What the experts make of the assignments (n, k, D) that are the first to `first` + `room` of
    their bin; of the others zero.
    """
    x, kernels = floats
    width = x.shape[1]
    begins = _starts(trip.sizes).reshape(plan.bins, plan.local)[:, 0]
    bins = trip.lanes // plan.local
    within = trip.position - begins[bins] - first
    slots = jnp.where(
        trip.kept & (within >= 0) & (within < room), bins * room + within, plan.bins * room
    )
    rows = inverse(slots, plan.bins * room)
    sent = take(x, rows, slots)
    if plan.degree == 0:
        return collect(compute(sent, trip.sizes, kernels), rows, slots)
    # of tokens here for each expert of a device, and of each device's for each expert here
    leaving = _overlap(trip.sizes.reshape(plan.bins, plan.local), first, room)
    leaving = _repeated(plan, leaving)
    coming = exchange.all_to_all(GROUP, leaving, plan.node)
    sent = _repeated(plan, sent.reshape(plan.bins, room, width))
    size, back = room // plan.slices, []
    for begin in range(0, room, size):
        counts = _overlap(coming, begin, size)
        there = _overlap(leaving, begin, size).sum(axis=1, dtype=jnp.int32)
        here = counts.sum(axis=1, dtype=jnp.int32)
        part = sent[:, begin : begin + size]
        arrived = exchange.rows(GROUP, part, there, here, plan.node).reshape(-1, width)
        y = _by_expert(compute, arrived, counts, size, kernels)
        y = y.reshape(plan.devices, size, width)
        back.append(exchange.rows(GROUP, y, here, there, plan.node))
    y = jnp.concatenate(back, axis=1)
    exact = jnp.promote_types(jnp.float32, x.dtype)
    y = y.reshape(-1, plan.degree, plan.replicas, room, width).sum(axis=1, dtype=exact)
    return collect(y.astype(x.dtype).reshape(-1, width), rows, slots)


def _overlap(counts, first, room):
    """Of rows sorted by expert, `counts` (..., experts), how many are among `room` from `first`."""
    begin = _starts(counts, axis=1)
    return jnp.clip(begin + counts, first, first + room) - jnp.clip(begin, first, first + room)


def _by_expert(compute, x, counts, size, kernels):
    """compute over rows of several devices, `size` of each, sorted by expert on each."""
    within = jnp.arange(size, dtype=jnp.int32)
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    here = (within[None, :, None] >= ends[:, None, :]).sum(axis=2, dtype=jnp.int32)
    none = here == counts.shape[1]
    here = jnp.where(none, 0, here)
    sizes = counts.sum(axis=0, dtype=jnp.int32)
    # of each device's rows for each expert, from their place there to that among all
    shift = _starts(sizes) + _starts(counts) - _starts(counts, axis=1)
    sorted_at = within[None] + jnp.take_along_axis(shift, here, axis=1)
    sorted_at = jnp.where(none, x.shape[0], sorted_at).reshape(-1, 1)
    rows = inverse(sorted_at, x.shape[0])
    y = compute(take(x, rows, sorted_at), sizes, kernels)
    return collect(y, rows, sorted_at)[:, 0]


def _repeated(plan, x):
    """Bins as devices: each bin's `degree` devices get the same."""
    x = x.reshape(-1, 1, plan.replicas, *x.shape[1:])
    x = jnp.broadcast_to(x, (x.shape[0], plan.degree, *x.shape[2:]))
    return x.reshape(plan.devices, *x.shape[3:])


def _gathered(plan, w, dtype):
    """(experts, F, ...) of what a device computes with, from its own part of (E F, ...)."""
    if _gathers(plan, w.ndim):
        gathered: Any = _whole(plan, dtype, w)
        w = checkpoint_name(gathered, GATHERED)
    return w.reshape(plan.local, -1, *w.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(plan, dtype, w):
    """Gathered in the dtype of use; its gradient is summed in the parameter's, or float32."""
    w = w.astype(dtype)
    for axis, options in _gathers(plan, w.ndim):
        w = jax.lax.all_gather(w, axis, tiled=True, **options)
    return w


def _gathers(plan, ndim) -> Sequence[tuple[Any, dict[str, Any]]]:
    found: list[tuple[Any, dict[str, Any]]] = []
    if mesh.size("fsdp") > 1 and ndim == 2:
        found.append(("fsdp", {"axis": 1}))
    if plan.devices > 1 and plan.degree == 0:
        found.append((GROUP, {"axis": 0}))
    elif plan.replicas > 1:
        q = plan.replicas
        groups = [[i + j for j in range(q)] for i in range(0, plan.devices, q)]
        found.append((GROUP, {"axis": 0, "axis_index_groups": groups}))
    return found


def _whole_forward(plan, dtype, w):
    return _whole(plan, dtype, w), jnp.zeros((0,), w.dtype)


def _whole_backward(plan, dtype, like, g):
    g = g.astype(jnp.promote_types(jnp.float32, like.dtype))
    for axis, options in reversed(_gathers(plan, g.ndim)):
        options = {"scatter_dimension" if k == "axis" else k: v for k, v in options.items()}
        g = jax.lax.psum_scatter(g, axis, tiled=True, **options)
    return (g.astype(like.dtype),)


_whole.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one_of(branches, room, index, load, floats, trip):
    """branches[index](floats, trip, 0); the last as often as its room goes into the load.

    What one branch keeps for its gradient another would have to make room for, so the backward
    pass begins from the arguments.
    """
    return _switched(branches, room, index, load, floats, trip)


def _switched(branches, room, index, load, *arguments):
    """The sum of a branch's results over its rounds, in the dtypes of one."""

    def rounds(*arguments):
        like = jax.eval_shape(branches[-1], *arguments, 0)
        total = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(jnp.float32, x.dtype)), like
        )

        def add(i, total):
            return jax.tree.map(jnp.add, total, branches[-1](*arguments, i * room))

        total = jax.lax.fori_loop(0, -(-load // room), add, total)
        return jax.tree.map(lambda x, to: x.astype(to.dtype), total, like)

    once = [lambda *arguments, one=one: one(*arguments, 0) for one in branches[:-1]]
    return jax.lax.switch(index, [*once, rounds], *arguments)


def _one_of_forward(branches, room, index, load, floats, trip):
    return _one_of(branches, room, index, load, floats, trip), (index, load, floats, trip)


def _one_of_backward(branches, room, kept, g):
    index, load, floats, trip = kept

    def back(branch, floats, trip, g, first):
        return jax.vjp(lambda floats: branch(floats, trip, first), floats)[1](g)[0]

    each = [functools.partial(back, branch) for branch in branches]
    return None, None, _switched(each, room, index, load, floats, trip, g), None


_one_of.defvjp(keep.rule(_one_of_forward), _one_of_backward)
