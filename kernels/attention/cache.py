"""A ring of past keys and values, by which attention goes on from where a call stopped.

The n-th token of a row's stream lies in slot n mod size; n counts every token that the row has
seen, padding and earlier documents included. Rows need not be equally long. Of several devices
each holds an equal run of the slots: its arrays are then that part of the ring. A head's keys lie
together, (B, G, S, K), so that a query reads them as they lie.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

State = dict[str, Array]


def empty(batch: int, size: int, heads: int, width: int, dtype: DTypeLike) -> State:
    """`length` is the number of tokens seen, `start` the number of the document's first."""
    if size < 1:
        raise ValueError(f"a cache of {size} tokens; it must hold at least 1")
    shape = (batch, heads, size, width)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "length": jnp.zeros(batch, jnp.int32),
        "start": jnp.zeros(batch, jnp.int32),
    }


def held(length: Int[Array, "B"], slots: Int[Array, "S"], size: int) -> Int[Array, "B S"]:
    """The number of the token in each of the slots after `length` tokens; -1 where none is."""
    last = length[:, None] - 1
    return jnp.maximum(last - (last - slots) % size, -1)


def oldest(length: Int[Array, "B"], time: int, size: int) -> Int[Array, "B"]:
    """The number of the oldest token that a call with `time` new ones reads."""
    return length - size + (time == 1)


def write(
    ring: Float[Array, "B G S K"],
    x: Float[Array, "B T G K"],
    length: Int[Array, "B"],
    first: Int[Array, ""] | int = 0,
    devices: int = 1,
) -> Float[Array, "B G S K"]:
    """The ring after the tokens `length`, `length` + 1, ...; of more than fit, the last stay.

    `first` is the number of the first slot here, where the ring lies over several devices.
    """
    batch, _, part, _ = ring.shape
    time = x.shape[1]
    size = devices * part
    number = length[:, None] + jnp.arange(max(time - size, 0), time, dtype=jnp.int32)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    new = x[:, -number.shape[1] :].astype(ring.dtype)
    slot = (number - first) % size  # of another device: past the end, and dropped
    return ring.at[rows, :, slot].set(new, unique_indices=True, mode="drop")


def extend(
    state: State,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    device: Int[Array, ""] | int = 0,
    devices: int = 1,
) -> tuple[State, State, Int[Array, "B S"]]:
    """Put tokens in: (the new rings, keys and values (B, G, S, K) to read here, their numbers).

    One token is written and then all is read, for what it overwrites is out of reach. Several
    are read beside the ring as it was, because the first of them may need what the last overwrite;
    each device reads its own span of them.
    """
    (part, time), length = (state["k"].shape[2], k.shape[1]), state["length"]
    first, size = device * part, devices * part
    slots = first + jnp.arange(part, dtype=jnp.int32)
    fresh = {"k": k, "v": v}
    new = {name: write(state[name], x, length, first, devices) for name, x in fresh.items()}
    if time == 1:
        return new, new, held(length + 1, slots, size)
    span = time // devices
    read = {}
    for name, x in fresh.items():
        own = jax.lax.dynamic_slice_in_dim(x, device * span, span, axis=1).swapaxes(1, 2)
        read[name] = jnp.concatenate([state[name], own.astype(state[name].dtype)], axis=2)
    number = length[:, None] + device * span + jnp.arange(span, dtype=jnp.int32)
    return new, read, jnp.concatenate([held(length, slots, size), number], axis=1)


def resized(state: State, size: int) -> State:
    """The state with a ring of another size; of more tokens than fit, the last stay."""
    length, old = state["length"], state["k"].shape[2]
    number = held(length, jnp.arange(size, dtype=jnp.int32), size)
    there = (number >= 0) & (number >= length[:, None] - old)

    def moved(ring):
        found = jnp.take_along_axis(ring, (number % old)[:, None, :, None], axis=2)
        return jnp.where(there[:, None, :, None], found, 0)

    return state | {name: moved(state[name]) for name in ("k", "v")}
