"""Roll-outs of a model of video: frames fed back, their error, and the time of one by horizon."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models import Video, merge, split

FIRST = 16  # frames of the first segment that is timed; each other is as long as all before it
ROUNDS = 3  # of each, the quickest counts
Segment = tuple[int, int, float]


def generated(model: Video, given: np.ndarray, count: int) -> np.ndarray:
    """`count` frames (B, count, H, W, C) after those given."""
    graphdef, *variables = split(model)

    @jax.jit
    def program(variables, frames):
        model: Any = merge(graphdef, *variables)
        return model.generate(frames, count)

    return np.asarray(program(variables, jnp.asarray(given)), np.float32)


def by_frame(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared error of each frame, a mean over clips and pixels."""
    return ((made - truth) ** 2).mean((0, 2, 3, 4))


def segments(count: int) -> list[tuple[int, int]]:
    """First and last frame of each span that is timed: of 100, 1-16, 17-32, 33-64 and 65-100."""
    ends = [FIRST]
    while ends[-1] < count:
        ends.append(2 * ends[-1])
    ends[-1] = min(ends[-1], count)
    return [(before + 1, end) for before, end in zip([0, *ends], ends, strict=False)]


def seconds_per_frame(model: Video, given: np.ndarray, count: int) -> list[Segment]:
    """(first, last, seconds of one frame of one clip) of each of `segments(count)`.

    A segment has caches of the length that it ends at: its time is that of a program which keeps
    no more than it needs. It is one compiled loop, begun once.
    """
    graphdef, *variables = split(model)

    @jax.jit
    def read(variables, frames, state):
        after, state = merge(graphdef, *variables)(frames, state)
        return after[:, -1:], state

    @functools.partial(jax.jit, static_argnums=3)
    def roll(variables, frame, state, frames):
        model: Any = merge(graphdef, *variables)
        return model.roll(frame, state, frames)[1:]

    frames, found = jnp.asarray(given[:1]), []
    room = [frames.shape[1] + last for _, last in segments(count)]
    frame, state = read(variables, frames, model.init_state(1, room[0]))
    for (first, last), size in zip(segments(count), room, strict=True):
        state, each = grown(state, model.init_state(1, size)), []
        for _ in range(1 + ROUNDS):  # the first compiles
            begun = time.perf_counter()
            after = jax.block_until_ready(roll(variables, frame, state, last - first + 1))
            each.append((time.perf_counter() - begun) / (last - first + 1))
        found.append((first, last, min(each[1:])))
        frame, state = after
    return found


def grown(state: Any, empty: Any) -> Any:
    """The state in the arrays of a larger one: caches with room for more, not yet wrapped round."""

    def put(x, room):
        return room.at[tuple(slice(0, n) for n in x.shape)].set(x)

    return jax.tree.map(put, state, empty)
