"""What every command of this folder does before it imports anything large."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOADED = ("IPython", "numpy")  # what a program that began elsewhere, a notebook, has loaded by now
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NAME, MARK = "glibc.malloc.hugetlb", "SCANAX_BEGAN_AGAIN"
TUNABLES = {
    NAME: 1,
    "glibc.malloc.mmap_threshold": 2**25,  # the largest that is taken
    "glibc.malloc.trim_threshold": 2**40,
    "glibc.malloc.arena_max": 1,  # a thread's own, once empty, is given back all the same
}


def begin(name: str) -> None:
    """`name` is the module's own, "__main__" where it is the program.

    This folder's files must not stand before libraries of their names, as they do in a program that
    is run by its path. And a program begins again with its memory in large pages, where Linux gives
    them to who asks and the C library asks if it is told so from the start: on a CPU a training
    step takes a fifth less time, for it waits for page tables no more. What it frees it keeps, but
    for what is above 32 MB: given back and taken again, call by call, it comes in small pages, on
    which some operations then wait a fifth of their time. GLIBC_TUNABLES with glibc.malloc.hugetlb
    in it is left as it is (=0: small pages).
    """
    if sys.path and os.path.realpath(sys.path[0]) == str(HERE):
        del sys.path[0]
    if name == "__main__" and alone() and (environment := with_large_pages(os.environ)):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def alone() -> bool:
    """Whether a file of this folder is what Python was started for, and nothing would be lost."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    ours = program is not None and Path(program).resolve().parent == HERE
    return ours and not any(module in sys.modules for module in LOADED)


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that asks for large pages; None if it does, or nobody would give them."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if MARK in environment or NAME in tunables or given() != "madvise" or not able():
        return None
    ours = (f"{name}={value}" for name, value in TUNABLES.items() if name not in tunables)
    joined = ":".join(filter(None, (tunables, *ours)))
    return {**environment, "GLIBC_TUNABLES": joined, MARK: tunables}


def before(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment as it was before this program asked for large pages, if it did."""
    found = dict(environment)
    if MARK in found:
        found["GLIBC_TUNABLES"] = found.pop(MARK)
        if not found["GLIBC_TUNABLES"]:
            del found["GLIBC_TUNABLES"]
    return found


def given() -> str:
    """Who gets large pages: "always", "madvise" (who asks) or "never"; "" where nobody says."""
    found = re.search(r"\[(\w+)\]", PAGES.read_text()) if PAGES.exists() else None
    return found[1] if found else ""


def able() -> bool:
    """Whether the C library is one that can ask: glibc from 2.35 on."""
    library, version = platform.libc_ver()
    return library == "glibc" and [int(x) for x in version.split(".")[:2]] >= [2, 35]


def large() -> bool:
    """Whether this program's memory lies in large pages."""
    asked = re.search(rf"{NAME}=(\d+)", os.environ.get("GLIBC_TUNABLES", ""))
    how = asked[1] if asked and able() else "0"
    return given() == "always" or how == "2" or (how == "1" and given() == "madvise")
