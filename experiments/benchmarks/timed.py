"""What is timed: made in this process, or in one of its own that has not asked for large pages."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from .. import starting, timing
from . import memory
from .peers import Absent
from .table import Row, Rows

ENDED = "its process ended, for want of memory perhaps"


class Here:
    """Made in this process: calls by name, what waits for their results, and what is known."""

    ended = ""

    def __init__(self, make: Callable[[], Any]):
        self.made = make()
        self.about: Row = self.made.about
        self.y: Any = getattr(self.made, "y", None)

    def close(self) -> None:
        """There is nothing to end."""

    def seconds(self, way: str) -> float:
        return timing.seconds(getattr(self.made, way), self.made.wait)

    def peak(self, way: str) -> float | None:
        return memory.peak(getattr(self.made, way), self.made.wait)


class Apart:
    """The same of what is made in a process of its own, which has the environment from before this
    program asked for large pages, as a program of another library has.

    `make` can be pickled. Absent if it makes nothing there. Where the process ends later, seconds
    are nan and `ended` says so.
    """

    def __init__(self, make: Callable[[], Any]):
        context = multiprocessing.get_context("spawn")
        self.ended = ""
        self.y: Any = None
        theirs, self.alive = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, context, _until, (theirs,))
        try:
            with environment(starting.before(os.environ)), uninterrupted():
                made = self.pool.submit(_make, make)
            theirs.close()
            self.about, self.y = made.result()
        except BrokenProcessPool:
            self.close()
            raise Absent(ENDED) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.alive.close()
        self.pool.shutdown()

    def seconds(self, way: str) -> float:
        return self._asked("seconds", way, math.nan)

    def peak(self, way: str) -> float | None:
        return self._asked("peak", way, None)

    def _asked(self, name: str, way: str, ended: Any) -> Any:
        try:
            return self.pool.submit(_call, name, way).result()
        except BrokenProcessPool:
            self.ended = ENDED
            return ended


Timed = Here | Apart
Kind = Callable[[Callable[[], Any]], Timed]
Makers = dict[str, tuple[Kind, Callable[[], Any]]]

_made: list[Here] = []  # in a process of its own, the one that it is for


def _until(alive: Any) -> None:
    """The process ends with the one that began it, however that ends, or when that closes `alive`,
    in the middle of a call too."""

    def wait():
        with contextlib.suppress(EOFError):
            alive.recv()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _make(make: Callable[[], Any]) -> tuple[Row, Any]:
    _made.append(Here(make))
    return _made[0].about, _made[0].y


def _call(name: str, way: str) -> float | None:
    return getattr(_made[0], name)(way)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """What the environment is within, for the processes that begin there."""
    changed = {name for name, value in os.environ.items() if values.get(name) != value}
    before = {name: os.environ.pop(name) for name in changed}
    try:
        os.environ.update({name: values[name] for name in changed if name in values})
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that begin within take no notice of a Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ways() -> dict[str, Kind]:
    """How another library is timed, by what its rows are called besides: in this process; and if
    that has large pages for having asked, as its own programs begin too."""
    asked = starting.MARK in os.environ and starting.large() and jax.default_backend() == "cpu"
    found: dict[str, Kind] = {"": Here}
    if asked:
        found[", small pages"] = Apart
    return found


@contextlib.contextmanager
def made(makers: Makers, rows: Rows) -> Iterator[dict[str, Timed]]:
    """What of them can be made, and by the end is still there; of the others a row says why not,
    once, however they are timed."""
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
        for name in [name for name, each in found.items() if each.ended]:
            rows[name] = {"note": f"none: {found.pop(name).ended}"}
