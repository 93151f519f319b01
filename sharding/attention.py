"""Softmax attention with time over the mesh axis `seq`, by four schedules with the same results.

    gather        each device has the keys and values of all     (LASP-2H, arXiv:2502.07563)
    ring          keys and values go round                       (arXiv:2310.01889)
    token-ring    queries go round, their results come back      (arXiv:2412.20501)
    ulysses       heads are exchanged for time, and back         (arXiv:2309.14509)

A result over some of the keys is (y, log-sum-exp), an element of the monoid SOFTMAX: the ring
merges one from each device. Causal work is even in zigzag: the sequence is cut into 2 P blocks, and
device r computes blocks r and 2 P - 1 - r. Positions and documents stay those of the sequence.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import kernels
from ..kernels import keep
from ..kernels.attention import attention_gradients, check, delta, visible
from ..kernels.monoid import LOWEST, SOFTMAX
from . import decoding, mesh, schedule
from .sequence import HEADS, TIME, grouped, manual

CACHED = ("q_index", "q_start", "kv_index")  # what attention over a cache is given
AXIS = "seq"


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    reset: Bool[Array, "B T"] | None = None,
    return_lse: bool = False,
    **how: Any,
) -> Any:
    """`kernels.attention` on the mesh in force, by the schedule in force.

    Raises what that raises, and ValueError for a size that does not divide over its axis, and for
    a `dtype`, which goes with keys of a cache alone.
    """
    sight: dict[str, Any] = {"causal": causal, "window": window}
    if not mesh.several():
        return kernels.attention(q, k, v, **sight, reset=reset, return_lse=return_lse, **how)
    cached = k.shape[1] != q.shape[1] or any(how.get(name) is not None for name in CACHED)
    if cached or q.shape[1] == 1:
        more = sight | {"reset": reset, "return_lse": return_lse}
        if not cached:  # one token sees itself
            more["causal"] = True
        return decoding.attention(q, k, v, **more, **how)
    how = {name: value for name, value in how.items() if name not in CACHED}
    if "dtype" in how:
        raise ValueError("dtype is no option of attention on a mesh: it returns that of q")
    check(q, k, v, causal, window, reset, None, None, None, how.get("block"))
    method, zigzag, steps = route(*q.shape[:3], causal, window)
    (k, v), lying = zip(*(grouped(x, q.shape[2]) for x in (k, v)), strict=True)

    def local(q, k, v, reset):
        every = None if reset is None else collected(reset)
        if method == "ulysses":
            out = ulysses(q, k, v, reset=every, **sight, **how)
        else:
            first, last = visible((q.shape[0], q.shape[1] * devices()), causal, window, every)
            if method == "gather":
                out = gather(q, k, v, first, last, **how)
            else:
                way = Ring(method == "token-ring", zigzag, steps, how)
                out = around(way, q, k, v, first, last)
        return out if return_lse else out[0]

    specs = (HEADS, *lying, None if reset is None else TIME)
    return manual(local, specs, (HEADS, HEADS) if return_lse else HEADS)(q, k, v, reset)


def route(
    rows: int, time: int, heads: int, causal: bool, window: int | None
) -> tuple[str, bool, int]:
    """Which schedule runs, whether in zigzag, and how many devices' keys a query needs besides.

    A causal window reaches back to a few devices, so that gathering takes keys from those only.
    """
    mesh.check(rows, time, heads)
    parts, method = mesh.size(AXIS), schedule.in_force().attention
    steps = parts - 1
    if causal and window is not None:
        steps = min(steps, -(-(window - 1) // (time // parts)))
    if parts == 1:
        method = "gather"
    elif method == "gather" and steps < parts - 1:
        method = "ring"
    zigzag = causal and window is None and method in ("ring", "token-ring")
    if method == "ulysses":
        mesh.divide("attention by ulysses: heads", heads, AXIS, "tensor")
    if zigzag and time % (2 * parts):
        short = mesh.refusal(time, {AXIS: parts, "halves": 2})
        raise ValueError(f"causal attention by {method}: length={short}")
    return method, zigzag, steps


def devices() -> int:
    return jax.lax.axis_size(AXIS)


def collected(x: Array) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def gather(q, k, v, first, last, **how):
    """(y, lse) of this device's queries; first and last are of the whole sequence's."""
    own = places(jax.lax.axis_index(AXIS), devices(), q.shape[1], False)
    mask = {"q_start": first[:, own], "q_index": last[:, own]}
    return kernels.attention(q, collected(k), collected(v), **mask, return_lse=True, **how)


def ulysses(q, k, v, **how):
    """(y, lse): all of time for each device's share of the heads."""
    times = math.lcm(k.shape[2], devices()) // k.shape[2]  # too few groups are repeated
    q, *kv = (exchange(x, 2, 1) for x in (q, *(jnp.repeat(x, times, axis=2) for x in (k, v))))
    y, lse = kernels.attention(q, *kv, return_lse=True, **how)
    return exchange(y, 1, 2), exchange(lse, 1, 2)


def exchange(x: Array, split: int, join: int) -> Array:
    return jax.lax.all_to_all(x, AXIS, split, join, tiled=True)


# The two rings: at step j queries meet the keys of j devices before them.


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    queries: bool
    """Whether queries go round, each step to the device before, or keys and values to the next."""
    zigzag: bool
    steps: int
    call: dict[str, Any]
    """The kernel's other arguments."""


def around(ring: Ring, q, k, v, first, last):
    """(y, lse) of this device's queries; first and last are of the whole sequence's."""
    common = jnp.result_type(q, k, v)
    sides = (x.astype(common) for x in (q, k, v))
    out: Any = _around(ring, *(relay(x) if ring.zigzag else x for x in sides), first, last)
    y, lse = (relay(x, back=True) if ring.zigzag else x for x in out)
    return y.astype(q.dtype), lse


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(ring, q, k, v, first, last):
    return _forward(ring, q, k, v, first, last)[0]


def _forward(ring, q, k, v, first, last):
    exact = jnp.promote_types(jnp.float32, q.dtype)

    def step(j, moving, total):
        (q_j,), kv_j = (moving, (k, v)) if ring.queries else ((q,), moving)
        met = met_at(ring, j, first, last)
        part = kernels.attention(q_j, *kv_j, **met, return_lse=True, dtype=exact, **ring.call)
        return SOFTMAX.combine(total, element(*shift(part, j if ring.queries else 0)))

    shape = *q.shape[:3], v.shape[3]
    nothing = element(jnp.zeros(shape, exact), jnp.full(shape[:3], -jnp.inf, exact))
    m, u, w = circulate(ring, (q,) if ring.queries else (k, v), step, nothing)
    y, lse = jnp.where(u[..., None] == 0, 0, w / u[..., None]).astype(q.dtype), m + jnp.log(u)
    return (y, lse), (q, k, v, first, last, y, lse)


def _backward(ring, residuals, cotangents):
    """Once more round; what is added up for k and v follows them, and goes home from the last.

    The barrier is against keeping what has travelled forward for this.
    """
    residuals, (dy, dlse) = jax.lax.optimization_barrier((residuals, cotangents))
    q, k, v, first, last, y, lse = residuals
    queries = q, dy, lse, delta(y, dy, dlse)

    def step(j, moving, total):
        (q_j, *rest), kv_j = (moving, (k, v)) if ring.queries else (queries, moving)
        met = met_at(ring, j, first, last)
        dq, *dkv = attention_gradients(q_j, *kv_j, *rest, **met, **ring.call)
        to_q, own, others = total
        if ring.queries:
            return to_q + shift(dq, j), add(own, dkv), others
        if j == 0:
            return to_q + dq, add(own, dkv), others
        return to_q + dq, own, add(shift(others, 1) if j > 1 else others, dkv)

    to_q, *to_kv = (jnp.zeros(x.shape, lse.dtype) for x in (q, k, v))
    moving = queries if ring.queries else (k, v)
    dq, own, others = circulate(ring, moving, step, (to_q, to_kv, to_kv))
    dk, dv = own if ring.queries else add(own, shift(others, -ring.steps))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_around.defvjp(keep.rule(_forward), _backward)


def circulate(ring: Ring, moving, step, total):
    """step(j, what is here of j devices away, total) in turn; the next is sent at the same time.

    The barrier keeps it at that: without it all could be sent, and held, before any is used.
    """
    for j in range(ring.steps + 1):
        following = shift(moving, -1 if ring.queries else 1) if j < ring.steps else ()
        total = step(j, moving, total)
        total, moving = jax.lax.optimization_barrier((total, following))
    return total


def shift(tree: Any, distance: int) -> Any:
    """Everything from the device that is so far before this one, round the ring."""
    parts = devices()
    pairs = [(i, (i + distance) % parts) for i in range(parts)]
    if distance % parts == 0:
        return tree
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def add(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.add, x, y)


def element(y: Array, lse: Array) -> tuple[Array, Array, Array]:
    """The summary of keys whose softmax gives this; a query that saw none is the identity."""
    none = jnp.isneginf(lse)
    return jnp.where(none, LOWEST, lse), (~none).astype(lse.dtype), y


def met_at(ring: Ring, j: int, first: Array, last: Array) -> dict[str, Array]:
    """What the kernel is told of step j: the keys' positions, and which each query may see."""
    span = first.shape[1] // devices()
    queries, keys = meeting(ring, j, jax.lax.axis_index(AXIS), devices(), span)
    keys = jnp.broadcast_to(keys, (first.shape[0], span))
    return {"q_start": first[:, queries], "q_index": last[:, queries], "kv_index": keys}


def meeting(ring: Ring, j: int, here: Any, parts: int, span: int) -> tuple[Array, Array]:
    """Places of the queries and of the keys that meet on this device at step j."""
    asking, asked = (here + j, here) if ring.queries else (here, here - j)
    return (
        places(asking % parts, parts, span, ring.zigzag),
        places(asked % parts, parts, span, ring.zigzag),
    )


def places(device: Any, parts: int, span: int, zigzag: bool) -> Array:
    """Index in the sequence of the tokens that a device computes, int32 (span,)."""
    if not zigzag:
        return device * span + jnp.arange(span, dtype=jnp.int32)
    half = jnp.arange(span // 2, dtype=jnp.int32)
    return jnp.concatenate([b * (span // 2) + half for b in (device, 2 * parts - 1 - device)])


def relay(x: Array, back: bool = False) -> Array:
    """From contiguous spans, blocks 2 d and 2 d + 1 on device d, to zigzag; or back.

    Every device has one block of even and one of odd number in both, so that either kind is
    permuted; in zigzag the first block of an odd device is its odd one.
    """
    parts, odd = devices(), jax.lax.axis_index(AXIS) % 2 == 1

    def turned(x):
        return jnp.where(odd, jnp.roll(x, x.shape[1] // 2, axis=1), x)

    blocks = jnp.split(turned(x) if back else x, 2, axis=1)
    for i in (0, 1):
        ways = [(d, min(2 * d + i, 2 * parts - 1 - 2 * d - i)) for d in range(parts)]
        ways = [(to, of) for of, to in ways] if back else ways
        blocks[i] = jax.lax.ppermute(blocks[i], AXIS, ways)
    x = jnp.concatenate(blocks, axis=1)
    return x if back else turned(x)
