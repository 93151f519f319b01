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
    file.write_text("always [madvise] never\n")
    return file


def test_large_pages_are_asked_for(pages):
    assert starting.with_large_pages({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": starting.TUNABLE}
    joined = starting.with_large_pages({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    assert joined == {"GLIBC_TUNABLES": f"glibc.malloc.check=1:{starting.TUNABLE}"}


def test_they_are_not_asked_for_twice_nor_in_vain(pages, monkeypatch):
    assert starting.with_large_pages({"GLIBC_TUNABLES": starting.TUNABLE}) is None
    assert starting.with_large_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None
    pages.write_text("[always] madvise never\n")
    assert starting.with_large_pages({}) is None
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(starting.platform, "libc_ver", lambda: ("", ""))
    assert starting.with_large_pages({}) is None
    pages.unlink()
    assert starting.with_large_pages({}) is None


def test_whether_pages_are_large(pages, monkeypatch):
    for asked, given in (("", False), (starting.TUNABLE, True), ("glibc.malloc.hugetlb=0", False)):
        monkeypatch.setenv("GLIBC_TUNABLES", asked)
        assert starting.large() == given
    pages.write_text("[always] madvise never\n")
    assert starting.large()


def test_nothing_begins_again_but_a_program(monkeypatch):
    """Not a module that is imported, nor a program inside another's process, as in a notebook."""
    monkeypatch.setattr(starting, "with_large_pages", lambda environment: {"A": "1"})
    monkeypatch.setattr(starting.os, "execve", lambda *_: pytest.fail("it began again"))
    starting.begin("scanax.experiments.train")
    assert "numpy" in sys.modules
    starting.begin("__main__")


def test_a_program_begins_again_as_it_was(tmp_path):
    """Once, with the same arguments and options of Python."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "program.py").write_text(
        "import os, pathlib, sys\n"
        "from scanax.experiments import starting\n"
        f"starting.PAGES = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "starting.platform.libc_ver = lambda: ('glibc', '2')\n"
        "print('begun', flush=True)\n"
        "starting.begin(__name__)\n"
        "print(sys.argv[1:], sys.flags.optimize, os.environ['GLIBC_TUNABLES'])\n"
    )
    run = [sys.executable, "-O", str(tmp_path / "program.py"), "--a", "b c"]
    done = subprocess.run(run, capture_output=True, text=True, env={})
    said = f"begun\nbegun\n['--a', 'b c'] 1 {starting.TUNABLE}\n"
    assert (done.stdout, done.stderr) == (said, "")
