"""What is timed: made in this process, or in one of its own that has not asked for large pages."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from .. import starting, timing
from . import memory
from .peers import Absent
from .table import Row, Rows


class Here:
    """Made in this process: calls by name, what waits for their results, and what is known."""

    def __init__(self, make: Callable[[], Any]):
        self.made = make()
        self.about: Row = self.made.about
        self.y = getattr(self.made, "y", None)

    def close(self) -> None:
        """There is nothing to end."""

    def seconds(self, way: str) -> float:
        return timing.seconds(getattr(self.made, way), self.made.wait)

    def peak(self, way: str) -> float | None:
        return memory.peak(getattr(self.made, way), self.made.wait)


class Apart:
    """The same of what is made in a process of its own, which has the environment from before this
    program asked for large pages, as a program of another library has.

    `make` can be pickled. Absent if it makes nothing there, or its process ends.
    """

    def __init__(self, make: Callable[[], Any]):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _left_alone)
        try:
            with environment(starting.before(os.environ)):
                self.about, self.y = self._there(_make, make)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.pool.shutdown()

    def seconds(self, way: str) -> float:
        return self._there(_call, "seconds", way)

    def peak(self, way: str) -> float | None:
        return self._there(_call, "peak", way)

    def _there(self, function: Callable, *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise Absent("its process ended, for want of memory perhaps") from None


Timed = Here | Apart
Kind = Callable[[Callable[[], Any]], Timed]
Makers = dict[str, tuple[Kind, Callable[[], Any]]]

_there: dict[str, Here] = {}  # in a process of its own, what it is for


def _left_alone() -> None:
    """The process ends when the one that began it is done with it, at Ctrl-C too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make(make: Callable[[], Any]) -> tuple[Row, Any]:
    _there["it"] = Here(make)
    return _there["it"].about, _there["it"].y


def _call(name: str, way: str) -> float | None:
    return getattr(_there["it"], name)(way)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """What the environment is within, for the processes that begin there."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(values)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ways() -> dict[str, Kind]:
    """How another library is timed, by what its rows are called besides: in this process; and if
    that has large pages for having asked, as its own programs begin too."""
    asked = starting.MARK in os.environ and starting.large() and jax.default_backend() == "cpu"
    return {"": Here} | ({", small pages": Apart} if asked else {})


@contextlib.contextmanager
def made(makers: Makers, rows: Rows) -> Iterator[dict[str, Timed]]:
    """What of them can be made; of the others a row says why not, once, however they are timed."""
    found: dict[str, Timed] = {}
    missing = set()
    with contextlib.ExitStack() as stack:
        for name, (kind, make) in makers.items():
            if make in missing:
                continue
            rows[name] = {}
            try:
                found[name] = kind(make)
                stack.callback(found[name].close)
            except (NotImplementedError, Absent) as error:
                rows[name] = {"note": f"none: {error}"}
                missing.add(make)
            except jax.errors.JaxRuntimeError as error:  # it does not fit this device, say
                rows[name] = {"note": f"none: {str(error).splitlines()[0]}"}
                missing.add(make)
        yield found
