"""What every command of this folder does before it imports anything large."""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

LOADED = ("IPython", "numpy")  # what a program that began elsewhere, a notebook, has loaded by now
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb=1"


def begin(name: str) -> None:
    """`name` is the module's own, "__main__" where it is the program.

    This folder's files must not stand before libraries of their names, as they do in a program that
    is run by its path. And a program begins again with its memory in large pages, where Linux gives
    them to who asks and the C library asks if it is told so from the start: on a CPU a training
    step takes a fifth less time, for it waits for page tables no more. GLIBC_TUNABLES with
    glibc.malloc.hugetlb in it is left as it is (=0: small pages).
    """
    if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]
    ours = name == "__main__" and not any(module in sys.modules for module in LOADED)
    if ours and (environment := with_large_pages(os.environ)):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that asks for large pages; None if it does, or nobody would give them."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not PAGES.exists():
        return None
    if "[madvise]" not in PAGES.read_text() or platform.libc_ver()[0] != "glibc":
        return None
    joined = ":".join(filter(None, (tunables, TUNABLE)))
    return {**environment, "GLIBC_TUNABLES": joined}


def large() -> bool:
    """Whether this program's memory lies in large pages, as far as Linux has them."""
    asked = TUNABLE in os.environ.get("GLIBC_TUNABLES", "")
    return PAGES.exists() and (asked or "[always]" in PAGES.read_text())
