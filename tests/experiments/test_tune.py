"""What `tune` measures is what kernels then look up; nothing is asserted about time."""

import json
import multiprocessing
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from scanax.experiments import tune
from scanax.kernels import dispatch, linear_attention, tuned
from support.targets import HOPPER, INTERPRETED, TPU

TINY = ("--batch", "1", "--heads", "2", "--length", "16", "--repeats", "1", "--widths", "8")
TINY += ("--dtypes", "float32")
OTHER = {"attention | xla | TPU v4 | K=64 V=64 dtype=bfloat16": 512}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The table that kernels read, not there yet."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("SCANAX_TILES", str(path))
    tuned.table.cache_clear()
    yield path
    tuned.table.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Instead of time: what the n-th size takes, as long as there are sizes."""
    times: list[float] = []

    def medians(calls, rounds):
        return dict(zip(calls, times, strict=False))

    monkeypatch.setattr(tune.timing, "medians", medians)
    return times


def looked_up(op, implementation="xla"):
    """What traced calls of an operation look up, and the sizes that the table has for them."""
    found = {}
    for case in tune.OPS[op](tune.Tune(batch=1, heads=2, length=16), 8, jnp.float32):
        with tuned.record() as asked:
            jax.eval_shape(tune.program(case, implementation, None), *case.arguments)
        found |= {key: tuned.table(tuned.path()).get(key) for key in asked}
    return found


@pytest.mark.parametrize("op", ["linear_attention", "selective_scan", "attention", "fixed_query"])
def test_what_is_written_is_what_calls_look_up(op, file, capsys):
    assert not any(looked_up(op).values())
    assert tune.main([*TINY, "--ops", op]) == 0
    written = json.loads(file.read_text())
    assert looked_up(op) == written and all(written.values())
    assert [path.name for path in file.parent.iterdir()] == ["tiles.json"]
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"written to {file}"
    for key, size in written.items():
        (line,) = (line for line in lines if line.startswith(key))
        assert line.endswith(f"chosen {size}")


@pytest.mark.parametrize("op", tune.OPS)
def test_kernels_for_tpus_look_up_one_entry_a_call(op, file):
    with dispatch.on(TPU):
        found = looked_up(op, "pallas_tpu")
    assert len(found) == 1 + (op == "linear_attention")
    assert all(key.startswith(f"{op} | pallas_tpu | TPU v5 lite | ") for key in found)


def test_a_kernel_for_tpus_is_tuned(file, capsys):
    """Through the interpreter; with what it alone looks up, the groups of keys."""
    with dispatch.on(INTERPRETED):
        assert tune.main([*TINY, "--ops", "decode"]) == 0
        written = json.loads(file.read_text())
        assert looked_up("decode", "pallas_tpu") | looked_up("decode") == written
    about = "TPU v5 lite | G=2 K=8 V=8 dtype=float32"
    assert written == {f"decode | pallas_tpu | {about}": 256, f"decode | xla | {about}": 1024}


@pytest.mark.parametrize("size", [1, 3, 48, 10**6])
@pytest.mark.parametrize(
    ("op", "device", "implementation"),
    [
        ("linear_attention", TPU, "pallas_tpu"),
        ("attention", TPU, "pallas_tpu"),
        ("decode", TPU, "pallas_tpu"),
        ("fixed_query", TPU, "pallas_tpu"),
        ("attention", HOPPER, "pallas_gpu"),
    ],
)
def test_an_entry_that_a_kernel_cannot_take_is_refused(op, device, implementation, size, file):
    """By the rule that holds for sizes that are named; else the numbers would be wrong."""
    file.parent.mkdir()
    kind = jnp.bfloat16 if device is HOPPER else jnp.float32
    width = 64 if device is HOPPER else 8
    case, *_ = tune.OPS[op](tune.Tune(batch=1, heads=2, length=64), width, kind)

    def trace():
        jax.eval_shape(tune.program(case, implementation, None), *case.arguments)

    with dispatch.on(device):
        with tuned.record() as asked:
            trace()
        (key,) = asked
        tune.write(file, key, size)
        if size == 48 and op != "linear_attention" and device is TPU:
            trace()  # a multiple of 16
            return
        with pytest.raises(ValueError, match=rf"has {size} for '{re.escape(key)}', but its "):
            trace()


def write_many(file, name):
    for size in range(1, 60):
        tune.write(file, name, size)


def test_two_that_tune_at_once_keep_each_others_entries(file):
    file.parent.mkdir()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(file, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert json.loads(file.read_text()) == {"a": 59, "b": 59}


@pytest.mark.parametrize("text", ["[" * 200_000, None])
def test_what_is_no_file_of_sizes_is_said_in_a_line(text, file):
    if text is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir()
        file.write_text(text)
    x = jnp.zeros((1, 16, 1, 8), jnp.float32)
    with pytest.raises(ValueError, match=rf"{file} (is not a table|cannot be read)"):
        linear_attention(x, x, x, jnp.zeros(1, jnp.float32))


def test_the_next_process_uses_it(file):
    key = tuned.key("linear_attention", "xla", "cpu", decay="scalar", K=8, V=8, dtype="float32")
    file.parent.mkdir()
    tune.write(file, key, 4)
    code = (
        "import jax, jax.numpy as jnp\n"
        "from scanax.kernels import linear_attention\n"
        "x, log = jnp.zeros((1, 16, 1, 8), jnp.float32), jnp.zeros((1, 16, 1), jnp.float32)\n"
        "jaxpr = jax.make_jaxpr(lambda x: linear_attention(x, x, x, log))(x)\n"
        "print('length=4' in str(jaxpr))\n"
    )
    run = [sys.executable, "-c", code]
    for table, chunks in ((file, "True"), (file.with_name("none"), "False")):
        env = os.environ | {"SCANAX_TILES": str(table)}
        done = subprocess.run(run, capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == chunks


def test_a_written_entry_is_used_at_once(file, clock):
    """In the same process too: the chunk of 8 makes two of 16 tokens, whatever came before."""
    x, log = jnp.zeros((1, 16, 2, 8), jnp.float32), jnp.zeros((1, 16, 2), jnp.float32)

    def chunks():
        jaxpr = jax.make_jaxpr(lambda x: linear_attention(x, x, x, log))(x)
        return "length=2" in str(jaxpr)

    assert not chunks()
    clock[:] = 1.0, 2.0, 3.0, 4.0
    assert tune.main([*TINY, "--ops", "linear_attention"]) == 0
    assert set(json.loads(file.read_text()).values()) == {8}
    assert chunks()


def test_the_default_stays_unless_another_is_clearly_faster():
    assert tune.choice({8: 0.98, 16: 1.0, 32: 2.0}, 16) == 16
    assert tune.choice({8: 0.96, 16: 1.0, 32: 0.9}, 16) == 32
    assert tune.choice({8: 2.0, 32: 1.0}, 16) == 32  # the default could not be had


def test_other_entries_survive(file, clock):
    """What was tuned before of the same call is replaced, by the default too."""
    file.parent.mkdir()
    key = "fixed_query | xla | cpu | K=8 V=8 dtype=float32"
    file.write_text(json.dumps({**OTHER, key: 8}))
    clock[:] = 1.0, 1.0
    assert tune.main([*TINY, "--ops", "fixed_query"]) == 0
    assert json.loads(file.read_text()) == {**OTHER, key: 16}


def test_a_choice_is_kept_when_the_next_call_is_interrupted(file, clock, monkeypatch):
    clock[:] = 1.0, 2.0, 3.0

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(tune.OPS, "attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.main([*TINY, "--ops", "fixed_query", "attention"])
    assert list(json.loads(file.read_text()).values()) == [8]


def test_a_size_that_is_refused_is_passed_over(file, clock, monkeypatch, capsys):
    """By the implementation, or by whatever fails when it is compiled."""
    module = sys.modules[linear_attention.__module__]

    def refuse(q, k, v, log_decay, state, reset, chunk):
        return "its chunks are not 8" if chunk == 8 else None

    def run(*arguments):
        if arguments[-1] == 16:
            raise RuntimeError("no room\nin the cache")
        return module.xla.linear_attention(*arguments)

    one = {"xla": dispatch.Implementation(run, refuse)}
    monkeypatch.setattr(module, "IMPLEMENTATIONS", one)
    clock[:] = 2.0, 1.0
    assert tune.main([*TINY, "--ops", "linear_attention"]) == 0
    key = tuned.key("linear_attention", "xla", "cpu", decay="scalar", K=8, V=8, dtype="float32")
    lines = capsys.readouterr().out.splitlines()
    assert f"{key}: 8 is passed over: its chunks are not 8" in lines
    assert f"{key}: 16 is passed over: RuntimeError: no room" in lines
    assert f"{key} | 32: 2 | default 32, chosen 32" in lines
    assert f"{key.replace('scalar', 'vector')}: it takes none of 8, 16" in lines
    assert json.loads(file.read_text()) == {key: 32}


def test_implementations_that_do_not_run_here_are_said(file, capsys):
    """Once each, for all widths."""
    assert tune.main([*TINY, "--ops", "decode", "--widths", "8", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line for line in lines if not line.startswith("decode | xla")] == [
        "decode pallas_gpu: it runs on Hopper GPUs (H100, H200), and this is cpu",
        "decode pallas_tpu: it runs on TPUs, and this is cpu",
        f"written to {file}",
    ]


def test_a_call_without_sizes_is_passed_over(file, monkeypatch, capsys):
    module = sys.modules[linear_attention.__module__]
    run = dispatch.Implementation(lambda q, k, v, log_decay, state, *_: (v, state))
    monkeypatch.setattr(module, "IMPLEMENTATIONS", {"xla": run})
    assert tune.main([*TINY, "--ops", "linear_attention"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "linear_attention xla: passed over, since it looks up no sizes of its own",
        "nothing was written",
    ]
    assert not file.exists()


def test_a_table_elsewhere(file, clock, tmp_path, capsys):
    other = tmp_path / "other.json"
    clock[:] = 1.0, 1.0
    assert tune.main([*TINY, "--ops", "fixed_query", "--out", str(other)]) == 0
    assert not file.exists() and other.exists()
    last = f"kernels read it where SCANAX_TILES={other}"
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize("text", ["{", '{"a": 0}', "[]"])
def test_a_damaged_table_is_said_in_a_line_and_kept(text, file, capsys):
    file.parent.mkdir()
    file.write_text(text)
    assert tune.main([*TINY, "--ops", "fixed_query"]) == 2
    said = f"tune: {file} is not a table of tile sizes; delete it\n"
    assert capsys.readouterr().err == said
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--ops linear", "--ops linear: not one of linear_attention, selective_scan, attention,"),
        ("--dtypes float16", "--dtypes float16: not one of float32, bfloat16"),
        ("--widths 0", "--widths 0 must be at least 1"),
        ("--repeats 0", "--repeats 0 must be at least 1"),
        ("--length x", "--length"),
        ("--out /dev/null/x/tiles.json", "/dev/null"),
    ],
)
def test_a_wrong_flag_is_said_in_a_line(flags, says, capsys):
    assert tune.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune: ") and says in line
