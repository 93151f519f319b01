"""What a command does first: its folder hides no library, and its memory lies in large pages."""

import subprocess
import sys

import pytest
from scanax.experiments import starting


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The file in which Linux says who gets large pages."""
    file = tmp_path / "enabled"
    monkeypatch.setattr(starting, "PAGES", file)
    monkeypatch.setattr(starting.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    file.write_text("always [madvise] never\n")
    return file


LARGE = "glibc.malloc.hugetlb=1"
KEPT = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (("mmap_threshold", 2**25), ("trim_threshold", 2**40), ("arena_max", 1))
)
ASKED = {"GLIBC_TUNABLES": f"{LARGE}:{KEPT}", starting.MARK: ""}


def test_large_pages_are_asked_for(pages):
    assert starting.with_large_pages({"A": "1"}) == {"A": "1"} | ASKED
    for own, more in ("check=1", KEPT), ("mmap_threshold=4096", KEPT.split(":", 1)[1]):
        joined = starting.with_large_pages({"GLIBC_TUNABLES": f"glibc.malloc.{own}"})
        assert joined["GLIBC_TUNABLES"] == f"glibc.malloc.{own}:{LARGE}:{more}"


def test_the_environment_before(pages):
    for given in {}, {"A": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.check=1"}:
        assert starting.before(starting.with_large_pages(given)) == given
    given = {"GLIBC_TUNABLES": LARGE}  # the user's own
    assert starting.before(given) == given


def test_they_are_not_asked_for_twice_nor_in_vain(pages, monkeypatch):
    assert starting.with_large_pages(ASKED) is None
    assert starting.with_large_pages({starting.MARK: ""}) is None  # something dropped the tunable
    assert starting.with_large_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None
    for mode in ("[always] madvise never\n", "always madvise [never]\n"):
        pages.write_text(mode)
        assert starting.with_large_pages({}) is None
    pages.write_text("always [madvise] never\n")
    for library in (("", ""), ("glibc", "2.34"), ("musl", "1.2")):
        monkeypatch.setattr(starting.platform, "libc_ver", lambda library=library: library)
        assert starting.with_large_pages({}) is None
    pages.unlink()
    assert starting.with_large_pages({}) is None


@pytest.mark.parametrize(
    ("mode", "asked", "found"),
    [
        ("always [madvise] never", "", False),
        ("always [madvise] never", "glibc.malloc.hugetlb=1", True),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", False),
        ("[always] madvise never", "", True),
        ("always madvise [never]", "glibc.malloc.hugetlb=1", False),
        ("always madvise [never]", "glibc.malloc.hugetlb=2", True),  # a kind of its own
    ],
)
def test_whether_pages_are_large(pages, monkeypatch, mode, asked, found):
    pages.write_text(mode)
    monkeypatch.setenv("GLIBC_TUNABLES", asked)
    assert starting.large() == found


def test_nothing_begins_again_but_a_program(monkeypatch):
    """Not a module that is imported, nor a program inside another's process, as in a notebook."""
    monkeypatch.setattr(starting, "with_large_pages", lambda environment: {"A": "1"})
    monkeypatch.setattr(starting.os, "execve", lambda *_: pytest.fail("it began again"))
    starting.begin("scanax.experiments.train")
    assert "numpy" in sys.modules
    starting.begin("__main__")


PROGRAM = """
import os, pathlib, sys
from scanax.experiments import starting
starting.PAGES = pathlib.Path({pages!r})
starting.HERE = pathlib.Path({folder!r})
starting.platform.libc_ver = lambda: ("glibc", "2.40")
print("begun", flush=True)
starting.begin(__name__)
print(sys.argv[1:], sys.flags.optimize, os.environ.get("GLIBC_TUNABLES"))
"""


def test_a_program_begins_again_as_it_was(tmp_path):
    """Once, with the same arguments and options of Python; one read from standard input does not,
    for it could not be read again."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    program = PROGRAM.format(pages=str(tmp_path / "enabled"), folder=str(tmp_path.resolve()))
    (tmp_path / "program.py").write_text(program)
    run = [sys.executable, "-O", str(tmp_path / "program.py"), "--a", "b c"]
    done = subprocess.run(run, capture_output=True, text=True, env={})
    said = f"begun\nbegun\n['--a', 'b c'] 1 {LARGE}:{KEPT}\n"
    assert (done.stdout, done.stderr) == (said, "")
    done = subprocess.run([sys.executable], input=program, capture_output=True, text=True, env={})
    assert (done.stdout, done.stderr) == ("begun\n[] 0 None\n", "")


FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for call in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [libc.malloc(size) for size in (3_000_000, 20_000_000, 9_000_000)]
    for each, size in zip(held, (3_000_000, 20_000_000, 9_000_000)):
        ctypes.memset(each, 1, size)
        libc.free(each)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not starting.able(), reason="it is glibc that keeps it, from 2.35 on")
def test_what_is_freed_is_kept():
    """No call waits for pages that the one before it had."""
    run = [sys.executable, "-c", FAULTS]
    faults = [
        int(subprocess.check_output(run, env={"GLIBC_TUNABLES": tunables}))
        for tunables in ("glibc.malloc.trim_threshold=131072", KEPT)
    ]
    assert faults[1] < 10 < 50 < faults[0]
