"""Attention over a cache that lies over `seq`: keys and values stay, queries visit all devices.

Each device attends over its own part of the keys; the partial results are merged by the softmax
monoid (split-KV, as in flash-decoding and LeanAttention, arXiv:2405.10480). A single query is on
every device to begin with; several, which lie over `seq`, are gathered and their results return.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from .. import kernels
from ..kernels.attention import cache, check
from ..kernels.monoid import LOWEST, SOFTMAX, fold
from . import mesh
from .sequence import gathered, lying, manual

ROW = P(mesh.ROWS)


def over_cache(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    state: cache.State,
    position: Int[Array, "B T"],
    window: int | None = None,
) -> tuple[Float[Array, "B T H V"], cache.State]:
    """(y, rings): attention over the ring and the new tokens, which then stay in it.

    `position` is each token's in its document. A query that reaches back to a token that is no
    longer there is nan. On a mesh the ring's slots lie over `seq`, its heads over `tensor` if they
    divide, and a new token's key and value go to the device that has its slot.
    """
    length, time = state["length"], q.shape[1]
    rings = {name: state[name] for name in ("k", "v")}
    number = length[:, None] + jnp.arange(time, dtype=jnp.int32)
    start = number - position
    spread = mesh.several() and mesh.size("seq") > 1
    tensor = _heads(k.shape[2])

    def local(q, k, v, rings, length, start):
        every, devices, device = length[:, None] + jnp.arange(time, dtype=jnp.int32), 1, 0
        if spread:
            devices, device = jax.lax.axis_size("seq"), jax.lax.axis_index("seq")
            if time > 1:
                q, k, v, start = gathered((q, k, v, start), "seq")
        rings, read, index = cache.extend(rings | {"length": length}, k, v, device, devices)
        k, v = (read[name].astype(q.dtype).swapaxes(1, 2) for name in ("k", "v"))
        where = {"q_index": every, "q_start": start, "kv_index": index, "window": window}
        return _attend(q, k, v, tensor is None, spread, **where), rings

    if mesh.several():
        mesh.check(q.shape[0], time, q.shape[2])
        mesh.divide("cache", rings["k"].shape[2], "seq")
        whole, by_head = lying(time)
        ring = P(mesh.ROWS, tensor, "seq")
        new = P(*whole, tensor)
        local = manual(local, (by_head, new, new, ring, ROW, whole), (by_head, ring))
    y, rings = local(q, k, v, rings, length, start)
    first = start if window is None else jnp.maximum(start, number - window + 1)
    gone = first < cache.oldest(length, time, state["k"].shape[2])[:, None]
    return jnp.where(gone[..., None, None], jnp.nan, y), rings


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    q_index: Int[Array, "B T"] | None = None,
    q_start: Int[Array, "B T"] | None = None,
    kv_index: Int[Array, "B S"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    **how: Any,
) -> Float[Array, "B T H V"]:
    """`kernels.attention` over keys that lie over `seq`, in any order, on the mesh in force.

    A single key lies on every device, and nothing is exchanged.
    """
    (rows, time, heads), (length, groups) = q.shape[:3], k.shape[1:3]
    causal, how["causal"] = how.get("causal", True), True
    if how.pop("return_lse", False) or not causal:
        raise ValueError("only causal attention, without its log-sum-exp, runs on a mesh yet")
    check(q, k, v, True, how.get("window"), reset, q_index, q_start, kv_index, how.get("block"))
    mesh.check(rows, time, heads)
    if length > 1:
        mesh.divide("keys", length, "seq")
    index = {"q_index": q_index, "q_start": q_start, "kv_index": kv_index}
    for name, size in (("q_index", time), ("kv_index", length)):
        if index[name] is None:
            iota = jnp.arange(size, dtype=jnp.int32)
            index[name] = jnp.broadcast_to(iota, (rows, size))
    spread, tensor = mesh.size("seq") > 1 and length > 1, _heads(groups)

    def local(q, k, v, index):
        if spread and time > 1:
            q, *mine = gathered((q, index["q_index"], index["q_start"]), "seq")
            index = {"q_index": mine[0], "q_start": mine[1], "kv_index": index["kv_index"]}
        return _attend(q, k, v, tensor is None, spread, **index, **how)

    (whole, by_head), (keys, _) = lying(time), lying(length)
    new = P(*keys, tensor)
    places = {"q_index": whole, "q_start": None if q_start is None else whole, "kv_index": keys}
    return manual(local, (by_head, new, new, places), by_head)(q, k, v, index)


def _heads(groups: int) -> str | None:
    """The axis that groups of keys and values lie over; None if they do not divide."""
    return "tensor" if not mesh.several() or groups % mesh.size("tensor") == 0 else None


def _attend(q, k, v, every_group, spread, **how) -> Any:
    """Inside shard_map: all queries over this device's keys, and then over those of all.

    `every_group`: k and v have the groups of all heads, q this device's heads. `spread`: other
    devices of `seq` have other keys; of several queries each gets back its span.
    """
    if every_group:
        heads = q.shape[2]
        each = heads * jax.lax.axis_size("tensor") // k.shape[2]
        alike = math.gcd(heads, each)  # neighbours here that read one group
        head = jax.lax.axis_index("tensor") * heads + jnp.arange(0, heads, alike, dtype=jnp.int32)
        k, v = (jnp.take(x, head // each, axis=2) for x in (k, v))
    if not spread:
        return kernels.attention(q, k, v, **how)
    exact = jnp.promote_types(jnp.float32, q.dtype)
    y, lse = kernels.attention(q, k, v, return_lse=True, dtype=exact, **how)
    part = jnp.concatenate([y, jnp.maximum(lse, LOWEST)[..., None]], axis=-1)
    if q.shape[1] == 1:
        parts = jax.lax.all_gather(part, "seq")
    else:
        parts = part.reshape(part.shape[0], jax.lax.axis_size("seq"), -1, *part.shape[2:])
        parts = jax.lax.all_to_all(jnp.moveaxis(parts, 1, 0), "seq", 0, 0)
    m, w = parts[..., -1], parts[..., :-1]
    u = jnp.where(m == LOWEST, 0, 1).astype(m.dtype)  # nan stays nan
    _, u, w = fold(SOFTMAX, (m, u, w))
    return jnp.where(u[..., None] == 0, 0, w / jnp.where(u == 0, 1, u)[..., None]).astype(q.dtype)
