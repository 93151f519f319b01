"""A ring of past keys and values, by which attention goes on from where a call stopped.

The n-th token of a row's stream lies in slot n mod size; n counts every token that the row has
seen, padding and earlier documents included. Rows need not be equally long.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

State = dict[str, Array]


def empty(batch: int, size: int, heads: int, width: int, dtype: DTypeLike) -> State:
    """`length` is the number of tokens seen, `start` the number of the document's first."""
    if size < 1:
        raise ValueError(f"a cache of {size} tokens; it must hold at least 1")
    shape = (batch, size, heads, width)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "length": jnp.zeros(batch, jnp.int32),
        "start": jnp.zeros(batch, jnp.int32),
    }


def held(length: Int[Array, "B"], size: int) -> Int[Array, "B S"]:
    """The number of the token in each slot after `length` tokens; negative where none is."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(size, dtype=jnp.int32)) % size


def write(
    ring: Float[Array, "B S G K"], x: Float[Array, "B T G K"], length: Int[Array, "B"]
) -> Float[Array, "B S G K"]:
    """The ring after the tokens `length`, `length` + 1, ...; of more than fit, the last stay."""
    (batch, size), time = ring.shape[:2], x.shape[1]
    number = length[:, None] + jnp.arange(max(time - size, 0), time, dtype=jnp.int32)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    new = x[:, -number.shape[1] :].astype(ring.dtype)
    return ring.at[rows, number % size].set(new, unique_indices=True)


def extend(
    state: State, k: Float[Array, "B T G K"], v: Float[Array, "B T G K"]
) -> tuple[State, State, Int[Array, "B S"], Int[Array, "B"]]:
    """Put tokens in: (new rings, keys and values to read, their numbers, the oldest that is there).

    One token is written and then all is read, for what it overwrites is out of reach. Several
    are read beside the ring as it was, because the first of them may need what the last overwrite.
    """
    size, time, length = state["k"].shape[1], k.shape[1], state["length"]
    new = {"k": write(state["k"], k, length), "v": write(state["v"], v, length)}
    if time == 1:
        return new, new, jnp.maximum(held(length + 1, size), -1), length + 1 - size
    read = {
        name: jnp.concatenate([state[name], x.astype(state[name].dtype)], axis=1)
        for name, x in (("k", k), ("v", v))
    }
    number = length[:, None] + jnp.arange(time, dtype=jnp.int32)
    old = jnp.maximum(held(length, size), -1)
    return new, read, jnp.concatenate([old, number], axis=1), length - size
