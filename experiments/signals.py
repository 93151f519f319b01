"""Being told to stop, by a signal."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come. A second one finds the handler of before, and ends the
    process at once.
    """
    asked, before = [], {}
    if threading.current_thread() is not threading.main_thread():  # only that one hears signals
        yield lambda: False
        return

    def ask(kind, _):
        asked.append(kind)
        signal.signal(kind, before[kind])

    for kind in (signal.SIGTERM, signal.SIGINT):
        before[kind] = signal.signal(kind, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
