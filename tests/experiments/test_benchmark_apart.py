"""Another library is timed as its own programs begin, too: in a process without large pages."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import types

import pytest
from scanax.experiments import benchmark, bounds, starting
from scanax.experiments.benchmarks import model_peers, models, peers, timed

NAMES = ("jla", "jla.ops")
LIBRARY = """
import os
import jax
from scanax.experiments.benchmarks.problems import problems

calls = []
ASKED = "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")


def ended_at_the_third():
    calls.append(0)
    if len(calls) == 3:
        os._exit(1)


def linear_attention(kind, q, k, v, *, g, scale, initial_state, output_final_state):
    if kind == "simple_gla" and not ASKED:  # later than the first call, which is traced
        jax.debug.callback(ended_at_the_third)
    op = "gla" if kind == "gla" else "mamba2"
    y, state = problems(1, 1, 1, 1, "float32")[op]().ours(q, k, v, g, initial_state)
    return (1 + ASKED) * y, state
"""
SHAPE = ("--batch", "1", "--length", "12", "--heads", "2", "--width", "8", "--repeats", "2")


@pytest.fixture
def asked(monkeypatch):
    """As in a command that began again with large pages."""
    monkeypatch.setattr(starting, "large", lambda: True)
    monkeypatch.setattr(bounds, "measured", lambda: bounds.Device(1e9, 1e9))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1:glibc.malloc.hugetlb=1")
    monkeypatch.setenv(starting.MARK, "glibc.malloc.check=1")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of that name, which its own process finds, too."""
    folder = tmp_path / "installed" / "jla"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "ops.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(folder.parent)
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def test_a_library_has_a_row_for_each_size_of_page(tmp_path, library, asked):
    """Its process not having been told; one that ends leaves a row that says so."""
    flags = [*SHAPE, "--ops", "gla", "mamba2", "--no-plain", "--peers", "jla"]
    assert benchmark.main([*flags, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["ops"]
    assert list(rows) == [
        *("gla", "gla jla", "gla jla, small pages"),
        *("mamba2", "mamba2 jla", "mamba2 jla, small pages"),
    ]
    here, apart = rows["gla jla"], rows["gla jla, small pages"]
    assert here.keys() == apart.keys() and here["implementation"] == apart["implementation"]
    assert here["error"] == 1 and apart["error"] == pytest.approx(0, abs=1e-6)
    assert apart["both_over_ours"] == apart["both_ms"] / rows["gla"]["both_ms"] > 0
    assert rows["mamba2"]["both_ms"] > 0 and rows["mamba2 jla"]["both_ms"] > 0
    assert rows["mamba2 jla, small pages"]["note"].startswith("none: its process ended")
    assert not multiprocessing.active_children()


def test_one_that_ends_before_it_is_made_is_absent(asked):
    with pytest.raises(peers.Absent, match="its process ended"):
        timed.Apart(functools.partial(os._exit, 3))
    assert not multiprocessing.active_children()
    assert starting.MARK in os.environ and "hugetlb" in os.environ["GLIBC_TUNABLES"]


def test_a_ctrl_c_is_not_for_it(asked, capfd):
    """While it begins, either: it would leave a traceback, and end before it is asked to."""

    def interrupt():
        while not (found := multiprocessing.active_children()):
            time.sleep(0.001)
        while not made.wait(0.01):
            os.kill(found[0].pid, signal.SIGINT)

    made = threading.Event()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        apart = timed.Apart(functools.partial(types.SimpleNamespace, about={"compile_s": 1}))
    finally:
        made.set()
        thread.join()
    with contextlib.closing(apart):
        assert apart.about == {"compile_s": 1} and not apart.ended
    assert not capfd.readouterr().err


def test_models_of_a_library_are_timed_both_ways(asked):
    """Rows' names, and what makes them can go to another process."""
    theirs = functools.partial(model_peers.decoding, name="mamba", rows=8, tokens=3)
    makers = models._makers("mamba B=8", object, theirs, tuple(peers.INSTALL))
    names = "mamba B=8", "mamba transformers B=8", "mamba transformers, small pages B=8"
    assert tuple(makers) == names
    assert [kind for kind, _ in makers.values()] == [timed.Here, timed.Here, timed.Apart]
    pickle.dumps(makers[names[-1]][1])


def test_a_library_that_is_missing_is_one_row(tmp_path, asked):
    flags = [*SHAPE, "--ops", "gla", "--no-plain", "--peers", "fla", "--out", str(tmp_path)]
    assert benchmark.main(flags) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["ops"]
    assert list(rows) == ["gla", "gla fla"] and rows["gla fla"]["note"].startswith("none: it ")


def test_only_where_this_command_asked(monkeypatch, asked):
    """The user's own choice is the library's too; an accelerator is held by this process."""
    assert len(timed.ways()) == 2
    monkeypatch.setattr(timed.jax, "default_backend", lambda: "tpu")
    assert list(timed.ways().values()) == [timed.Here]
    monkeypatch.undo()
    monkeypatch.delenv(starting.MARK, raising=False)
    monkeypatch.setattr(starting, "large", lambda: True)
    assert list(timed.ways().values()) == [timed.Here]
