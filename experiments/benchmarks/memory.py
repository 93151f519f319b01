"""How much memory a call takes at its highest, beyond what there is before it."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float | None:
    """Megabytes of this process, on a CPU, where that is what it computes in. None on other
    devices, and where the system does not tell (all but Linux)."""
    if jax.default_backend() != "cpu" or not CLEAR.exists():
        return None
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # what is free is given back
        trim(0)
    try:
        CLEAR.write_text("5")  # the highest begins anew, from what there is now
    except OSError:  # a container may forbid it
        return None
    before = _kilobytes("VmRSS")
    wait(call())
    return (_kilobytes("VmHWM") - before) * 1024 / 1e6


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) if found else 0
