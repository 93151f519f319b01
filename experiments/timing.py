"""Seconds of a call and of its gradient, medians of calls that take turns, and one core."""

import contextlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

WINDOW, MOST = 0.01, 100  # seconds that quick calls are repeated for, and how often at most
CHOOSES = hasattr(os, "sched_setaffinity")


def both(run: Callable) -> Callable:
    """The outputs of a call and its gradients to every float argument.

    The outputs are the cotangents too, as of half the sum of their squares: a backward pass that
    reads what it must, and nothing is added to either pass.
    """

    def outputs_and_gradients(*arguments):
        floats = {i: x for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)}

        def of(floats):
            return run(*(floats.get(i, x) for i, x in enumerate(arguments)))

        y, pull = jax.vjp(of, floats)
        return y, pull(y)[0]

    return outputs_and_gradients


def compiled(run: Callable, arguments: tuple) -> Any:
    """The program of a call of these arguments; whatever it calls is traced anew."""
    return jax.jit(lambda *given: run(*given)).lower(*arguments).compile()


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Of one call, among as many in a row as hide what it costs to begin one.

    The first is not timed: it pays for what ran before it, memory freed late too.
    """
    begun = time.perf_counter()
    wait(call())
    row = int(min(MOST, max(1, WINDOW / (time.perf_counter() - begun))))
    begun = time.perf_counter()
    for _ in range(row - 1):
        call()
    wait(call())
    return (time.perf_counter() - begun) / row


def rounds(count: int, bar: Any) -> Iterator[int]:
    """Numbers of rounds, each of which moves a progress bar when it is over."""
    for i in range(count):
        yield i
        bar.update()


def turns(calls: dict[Any, Callable[[], float]], rounds: Iterable[int]) -> dict[Any, list[float]]:
    """Milliseconds; in each round every call says its seconds once, so all drift alike."""
    spent: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in rounds:
        for name, call in calls.items():
            spent[name].append(1e3 * call())
    return spent


def medians(calls: dict[Any, Callable[[], float]], rounds: Iterable[int]) -> dict[Any, float]:
    """Median milliseconds of calls that take turns."""
    return {name: statistics.median(times) for name, times in turns(calls, rounds).items()}


def spread(times: list[float]) -> float:
    """Half of what the middle half of them differ by; 0 of one."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2


@contextlib.contextmanager
def one_core(which: int = -1) -> Iterator[None]:
    """Keeps this thread on one of the cores it may use, with the threads and processes it begins.

    JAX's own threads are among them where it has not yet begun its client (`jax.devices()` does).
    Where cores cannot be chosen (macOS) nothing is done.
    """
    if not CHOOSES:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[which]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def available() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if CHOOSES else os.cpu_count() or 1


def cores() -> int:
    """How many cores a computation within `one_core` has."""
    return 1 if CHOOSES else available()


def machine(cores: int, jobs: int = 1) -> str:
    """`AMD EPYC 9554, 1 core, jax 0.10.2`; other devices than the CPU by their kind."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*: (.*)", info.read_text("utf-8"))):
        cpu = model[1]
    device = jax.devices()[0]
    what = f"{cpu}, {cores} core" + "s" * (cores > 1)
    what += f" each for {jobs} runs at a time" if jobs > 1 else ""
    what += f", {device.device_kind}" if device.platform != "cpu" else ""
    return f"{what}, jax {jax.__version__}"
