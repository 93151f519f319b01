"""Time of a token and memory by length, forward and backward; every run reads as many tokens."""

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.typing import DTypeLike

from .. import timing
from .problems import problems
from .table import Rows

OPS = ("gla", "mamba2", "retention", "mamba", "aaren", "convs5")  # whose state does not grow


def measure(
    op: str,
    lengths: Sequence[int],
    heads: int,
    width: int,
    dtype: DTypeLike,
    rounds: Iterable[int],
) -> Rows:
    """A row for each length, which divides the longest: so many rows of it at once as have the
    longest's tokens. All take turns; temporaries are those of one row."""
    shortest, longest = min(lengths), max(lengths)
    calls: dict[int, Callable[[], float]] = {}
    memory: dict[int, int] = {}
    for length in lengths:
        programs = {}
        for rows in {1, longest // length}:
            problem = problems(rows, length, heads, width, dtype)[op]()
            program = timing.compiled(timing.both(problem.ours), problem.arguments)
            programs[rows] = functools.partial(program, *problem.arguments)
        memory[length] = programs[1].func.memory_analysis().temp_size_in_bytes
        calls[length] = functools.partial(timing.seconds, programs[longest // length])
        jax.block_until_ready(programs[longest // length]())
    times = {
        length: [1e3 * t / (longest // length * length) for t in spent]
        for length, spent in timing.turns(calls, rounds).items()
    }
    return {
        f"{op} {length}": {
            "length_tokens": length,
            "rows": longest // length,
            "both_us": statistics.median(times[length]),
            "both_us_spread": timing.spread(times[length]),
            "over_shortest": statistics.median(times[length]) / statistics.median(times[shortest]),
            "temporaries_mb": memory[length] / 1e6,
            "temporaries_bytes_per_token": memory[length] / length,
        }
        for length in lengths
    }
