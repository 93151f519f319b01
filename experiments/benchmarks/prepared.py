"""An operation that is ready to be timed."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import timing
from .table import Row


class Prepared(NamedTuple):
    """Both passes, each of which has run once."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    y: np.ndarray
    """What the forward pass computes, in float32."""
    about: Row
    """What is known before it is timed."""


def prepared(run: Callable, arguments: tuple) -> Prepared:
    """Of a function in JAX."""
    begun = time.perf_counter()
    forward, both = (timing.compiled(f, arguments) for f in (run, timing.both(run)))
    about: Row = {
        "implementation": "",
        "temporaries_mb": both.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_s": time.perf_counter() - begun,
    }
    y = jax.tree.leaves(forward(*arguments))[0]
    jax.block_until_ready(both(*arguments))
    return Prepared(
        functools.partial(forward, *arguments),
        functools.partial(both, *arguments),
        jax.block_until_ready,
        np.asarray(y, np.float32),
        about,
    )
