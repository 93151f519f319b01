"""The benchmark's tables have a row for everything; nothing is asserted about time."""

import dataclasses
import functools
import importlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.experiments import benchmark, bounds, starting, timing
from scanax.experiments.benchmarks import lengths, memory, peers, pictures, startup, whole_models
from scanax.experiments.benchmarks.problems import of_model, problems
from scanax.experiments.benchmarks.table import changes, markdown
from scanax.experiments.plots import bars
from scanax.layers.attention import AttentionConfig
from scanax.layers.gla import GLAConfig
from scanax.models import LM, LMConfig, split

SHAPE = ("--batch", "1", "--length", "12", "--heads", "2", "--width", "8", "--repeats", "2")
MODEL = ("--model-batch", "1", "--model-length", "5", "--tokens", "3", "--repeats", "1")
NUMBERS = {
    *("forward_ms", "forward_bound_ms", "forward_over_ours"),
    *("both_ms", "both_bound_ms", "both_over_ours", "temporaries_mb", "compile_s"),
}
SPREADS = {"forward_ms_spread", "both_ms_spread"}


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    """Nothing is measured of this machine but where a test asks."""
    monkeypatch.setattr(bounds, "measured", lambda: bounds.Device(1e9, 1e9))
    monkeypatch.setattr(bounds, "product", lambda: lambda: bounds.PRODUCT / 1e9)
    monkeypatch.setattr(bounds, "reading", lambda size: lambda: size / 1e9)


def tables(tmp_path, *flags):
    """What is in the file afterwards; libraries are not looked for unless they are named."""
    named = () if "--peers" in flags else ("--peers",)
    assert benchmark.main([*SHAPE, *flags, *named, "--out", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out" / "benchmark.json").read_text())


@pytest.mark.parametrize("op", ["grouped-8", "grouped-64", "attention", "retention", "convs5"])
def test_rows_of_an_operation(op, tmp_path, capsys):
    rows = tables(tmp_path, "--ops", op)["ops"]
    assert list(rows) == [op, f"{op} plain"]
    for row in rows.values():
        assert min(row.pop(name) for name in SPREADS) >= 0
    ours, plain = rows.values()
    assert ours.keys() | {"error"} == plain.keys() == NUMBERS | {"implementation", "error"}
    assert ours.pop("implementation") == "xla" and plain.pop("implementation") == ""
    assert min(ours.values()) > 0 and ours["both_over_ours"] == 1
    assert 0 <= plain.pop("error") < 1e-5 and min(plain.values()) > 0
    assert f"| {op} | xla |" in capsys.readouterr().out
    assert (tmp_path / "out" / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_implementations(tmp_path):
    """Further ones in the same run; one that does not take the call is a row that says so."""
    which = ("reference", "pallas_tpu")
    rows = tables(tmp_path, "--ops", "gla", "--implementations", *which, "--no-plain")["ops"]
    assert list(rows) == ["gla", "gla reference", "gla pallas_tpu"]
    assert [row.get("implementation") for row in rows.values()] == ["xla", "reference", None]
    note = rows["gla pallas_tpu"]["note"]
    assert note.startswith(
        "none: no implementation of linear_attention takes this call: pallas_tpu"
    )


@pytest.mark.parametrize(
    "op", ["gla", "mamba2", "retention", "mamba", "aaren", "convs5", "attention"]
)
def test_the_plain_ones_compute_the_same(op):
    """In bfloat16 too, where only the inputs and outputs are of that type."""
    for dtype, bar in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        problem = problems(1, 9, 2, 4, jnp.dtype(dtype))[op]()
        ours, plain = problem.ours(*problem.arguments), problem.plain(*problem.arguments)
        ours, plain = (jax.tree.leaves(x)[0] for x in (ours, plain))
        assert ours.dtype == plain.dtype == dtype
        ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
        assert np.abs(ours - plain).max() <= bar * np.abs(plain).max()


def test_bfloat16_and_markdown(tmp_path, capsys):
    """The file is what is printed, under a line that says what was measured where."""
    tables(tmp_path, "--dtype", "bfloat16", "--no-plain", "--ops", "aaren")
    file = tmp_path / "out" / "benchmark.md"
    about, rates, _, title, _, header, rule, row = file.read_text().splitlines()
    assert f", jax {jax.__version__}, " in about and " pages, 20" in about
    assert "batch 1, length 12, heads 2, width 8, dtype bfloat16, " in about
    assert title == "## Operations" and row.startswith("| aaren | xla |") and " ± " in row
    assert header.count("|") == rule.count("|") == row.count("|")
    assert rates.startswith("Bounds of operations: 1e+09 bytes and 1e+09 operations a second")
    assert {about, header, rule, row, rates} < set(capsys.readouterr().out.splitlines())


def without(monkeypatch, *packages):
    """As where these are not installed."""
    importing = importlib.import_module

    def found(name, *more):
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importing(name, *more)

    monkeypatch.setattr(importlib, "import_module", found)


def test_peers_that_are_not_there_are_rows_that_say_so(tmp_path, monkeypatch):
    """Of operations that they have; the rows of the others stay."""
    without(monkeypatch, "torch", "jla")
    flags = ("--ops", "gla", "aaren", "--no-plain", "--peers", *peers.INSTALL)
    rows = tables(tmp_path, *flags)["ops"]
    assert list(rows) == ["gla", "gla fla", "gla jla", "aaren"]
    for name, package in (("gla fla", "attention[cuda]==0.6.*'"), ("gla jla", "equinox")):
        assert rows[name].keys() == {"note"}
        assert rows[name]["note"].startswith("none: it is not installed (")
        assert rows[name]["note"].endswith(package)


def test_a_peer_without_its_device_is_said(monkeypatch):
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(peers.Absent, match="it needs an NVIDIA GPU and PyTorch for CUDA"):
        peers.prepare("fla", "gla", ())


def stand_in(factor):
    """Of a library in JAX: our own recurrence under its name, its outputs times a number."""

    def linear_attention(kind, q, k, v, *, g, scale, initial_state, output_final_state):
        assert (kind, scale, output_final_state) == ("gla", 1.0, True)
        problem = problems(1, 1, 1, 1, jnp.dtype(jnp.float32))["gla"]()
        y, state = problem.ours(q, k, v, g, initial_state)
        return factor * y, state

    return types.SimpleNamespace(linear_attention=linear_attention)


def test_a_peer_is_a_row(tmp_path, monkeypatch):
    """With how far it is from what ours computes."""
    monkeypatch.setitem(sys.modules, "jla", types.SimpleNamespace())
    for factor, error in ((1, 0), (2, 1)):
        monkeypatch.setitem(sys.modules, "jla.ops", stand_in(factor))
        row = tables(tmp_path, "--ops", "gla", "--peers", "jla")["ops"]["gla jla"]
        assert row.pop("implementation") == "xla" and row.pop("error") == error
        assert min(value for name, value in row.items() if name not in SPREADS) > 0


def small(monkeypatch):
    """Models of a block of width 8."""
    monkeypatch.setattr(whole_models, "config", functools.cache(smaller))


def smaller(name):
    config = LMConfig(vocab=256, width=8, depth=1, pattern=f"{name}+swiglu")
    return dataclasses.replace(config, gla=GLAConfig(heads=2), attention=AttentionConfig(heads=2))


def test_rows_of_models(tmp_path, monkeypatch):
    """A training step, and decoding by as many rows at once as are asked for; peers stay away."""
    small(monkeypatch)
    without(monkeypatch, "torch")
    flags = ("--models", "mamba", "gla", "--decode", "1", "2", "--peers", *peers.INSTALL)
    found = tables(tmp_path, *MODEL, *flags)
    assert "ops" not in found and "lengths" not in found
    assert list(found["models"]) == ["mamba", "mamba transformers", "gla"]
    assert list(found["decode"]) == [
        *("mamba B=1", "mamba transformers B=1", "gla B=1"),
        *("mamba B=2", "mamba transformers B=2", "gla B=2"),
    ]
    for rows in found["models"], found["decode"]:
        for name, row in rows.items():
            if "transformers" in name:
                assert row == {"note": f"none: {row['note'].removeprefix('none: ')}"}
                assert "it is not installed" in row["note"]
    step = found["models"]["gla"]
    assert (
        step["step_ms"] > 0 and step["step_over_bound"] == step["step_ms"] / step["step_bound_ms"]
    )
    products = 3 * 5 * whole_models.products(smaller("gla")) / 1e6  # milliseconds of five tokens
    assert step["step_bound_ms"] == pytest.approx(products + step["step_mixers_ms"])
    assert step["step_mixers_ms"] > 0 and step["temporaries_mb"] > 0
    token = found["decode"]["gla B=2"]
    assert token["token_bound_ms"] == pytest.approx(whole_models.moved(smaller("gla"), 2, 3) / 1e6)
    assert token["token_over_bound"] == token["token_ms"] / token["token_bound_ms"]
    assert token["tokens_per_s"] == pytest.approx(2e3 / token["token_ms"])
    for name in ("models", "decode"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_startup(tmp_path):
    row = tables(tmp_path, "--startup", "1", "--repeats", "1")["startup"]["train, depth 1"]
    assert min(row[name] for name in ("cold_s", "warm_s", "imports_s")) > 0
    assert (tmp_path / "out" / "startup.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_start_finds_what_the_first_compiled(tmp_path):
    cache, kept = tmp_path / "cache", []
    for run in "cold", "warm":
        startup._first_step(1, tmp_path / run, startup.surroundings(str(cache)))
        kept.append(sorted(cache.glob("jit_step-*-cache")))
        first = (tmp_path / run / "metrics.jsonl").read_text("utf-8").splitlines()[0]
        assert json.loads(first)["step"] == 1
    assert len(kept[0]) == 1 and kept[1] == kept[0]


def test_start_up_has_the_surroundings_of_a_command(monkeypatch):
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    monkeypatch.delenv(starting.MARK, raising=False)
    found = startup.surroundings("here")
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"  # the user's
    assert {name: x for name, x in found.items() if "CACHE" in name and "JAX" in name} == {
        "JAX_COMPILATION_CACHE_DIR": "here"
    }
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setenv(starting.MARK, "")
    found = startup.surroundings("here")
    assert "GLIBC_TUNABLES" not in found and starting.MARK not in found


def test_no_start_up_is_timed_beside_an_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(startup.jax, "default_backend", lambda: "tpu")
    row = tables(tmp_path, "--startup", "1")["startup"]["train, depth 1"]
    assert "holds the accelerator" in row["note"]


def test_a_command_that_ends_before_its_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, "TRAIN", "scanax.experiments.no_such")
    assert benchmark.main(["--startup", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "ended before its first step" in said and "No module named" in said


def test_rows_of_lengths(tmp_path):
    """As many tokens a run at every length; without --ops every operation whose state is kept."""
    rows = tables(tmp_path, "--lengths", "4", "8")["lengths"]
    assert list(rows) == [f"{op} {length}" for op in lengths.OPS for length in (4, 8)]
    assert [row["rows"] for row in rows.values()] == [2, 1] * len(lengths.OPS)
    assert all(row["both_us"] > 0 for row in rows.values())
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path, monkeypatch):
    def measure(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nand more")

    monkeypatch.setattr(lengths, "measure", measure)
    rows = tables(tmp_path, "--lengths", "4", "--ops", "gla")["lengths"]
    assert rows == {"gla": {"note": "none: RESOURCE_EXHAUSTED: 9 GB"}}


def test_groups_of_bars(tmp_path, monkeypatch):
    """A bar for each library beside ours, of decoding by its rows."""
    drawn = {}
    monkeypatch.setattr(bars, "draw", lambda path, groups, *_: drawn.update(groups))
    each = {"both_ms": 2.0, "both_bound_ms": 1.0}
    pictures.draw(tmp_path, "ops", {"a": each, "a plain": each, "a jla": {"note": "no"}}, "")
    assert drawn == {"a": {"scanax": (2.0, 1.0), "plain": (2.0, 1.0)}}
    drawn.clear()
    rows = {"m B=1": {"token_ms": 3.0}, "m theirs B=1": {"token_ms": 4.0}}
    pictures.draw(tmp_path, "decode", rows, "")
    assert drawn == {"m B=1": {"scanax": (3.0, None), "theirs": (4.0, None)}}


def test_a_table_is_compared_with_an_earlier_one(tmp_path, capsys):
    old = tables(tmp_path, "--ops", "convs5", "--no-plain")
    file = tmp_path / "old.json"
    old["ops"]["convs5"] |= {"both_ms": old["ops"]["convs5"]["both_ms"] * 1e9}
    file.write_text(json.dumps(old))
    tables(tmp_path, "--ops", "convs5", "--compare", str(file))
    title, _, _, _, row, _ = capsys.readouterr().out.splitlines()[-6:]
    assert "as parts of what" in title and row.startswith("| convs5 | ")
    assert any(float(cell) < 1e-6 for cell in row.split("|")[2:-1])
    flags = [*SHAPE, "--length", "13", "--ops", "gla", "--compare", str(file)]
    assert benchmark.main(flags) == 2
    assert "is of length=12, this of 13" in capsys.readouterr().err


def test_changes_are_of_times_and_memory_alone():
    old = {"a": {"x_ms": 2.0, "x_ms_spread": 1.0, "x_bound_ms": 1.0, "y_mb": 0.0, "n": "xla"}}
    new = {"a": {"x_ms": 1.0, "x_ms_spread": 3.0, "x_bound_ms": 2.0, "y_mb": 1.0}, "b": {"x_ms": 1}}
    old["a"]["tokens_per_s"], new["a"]["tokens_per_s"] = 1.0, 2.0
    assert changes(new, old) == {"a": {"x_ms": 0.5}}
    old["c"], new["c"] = {"x_us": 1.0, "rows": 1}, {"x_us": 1.0, "rows": 2}
    assert "c" not in changes(new, old)  # of another number of rows


def test_a_table_in_markdown():
    """Spreads behind their figures; no column that is empty."""
    rows = {"a": {"x_ms": 1234.5, "x_ms_spread": 0.25, "y": None}, "b": {"note": "none: here"}}
    assert markdown(rows) == [
        "|  | x ms | note |",
        "|---|---|---|",
        "| a | 1,234 ± 0.25 |  |",
        "| b |  | none: here |",
    ]


@pytest.mark.parametrize("name", whole_models.NAMES)
def test_products_of_a_model_are_those_of_its_parameters(name):
    """All matrices once a token, but embeddings, convolutions and experts that are not chosen."""
    config = whole_models.config(name)
    params = split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))[1]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    whole = sum(x.size for _, x in leaves if len(x.shape) > 2 or x.shape == (256, 256))
    counted = whole_models.products(config) / 2
    if name == "mixtral":  # two of eight experts; attention, routers, and the head
        experts = 4 * 8 * 3 * 256 * 704
        assert counted == 4 * (4 * 256 * 256 + 8 * 256) + 256 * 256 + experts / 4
    else:
        assert 0.5 * whole < counted <= whole
    ((problem, blocks),) = of_model(config, 1, 8)
    assert blocks == config.depth and problem.flops > 0


def test_the_highest_memory_of_a_call():
    found = memory.peak(lambda: np.ones(10_000_000), lambda x: x.sum())
    if memory.CLEAR.exists():
        assert 75 < found < 120
    else:
        assert found is None


def test_bounds_are_of_bytes_or_of_arithmetic():
    """Forward: inputs and outputs; backward: both again, and a gradient to every float input."""
    x, sizes = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros(3, jnp.int32)
    read, written = 64 + 12, 32
    fast, slow = bounds.Device(1e30, 1.0), bounds.Device(1.0, 1e30)
    assert bounds.least(fast, 5, (x, sizes), x[:2]) == (read + written, 2 * (read + written) + 64)
    assert bounds.least(slow, 5, (x, sizes), x[:2]) == (5, 15)


def test_what_is_published_of_a_device():
    """Of its own kind, not of one whose name begins alike; of no other is anything assumed."""
    kinds = {
        "NVIDIA H100 80GB HBM3": 3.35e12,
        "NVIDIA H100 PCIe": 2.0e12,
        "NVIDIA H200": 4.8e12,
        "TPU v5 lite": 8.19e11,
        "TPU v5p": 2.765e12,
        "TPU v6 lite": 1.64e12,
        "TPU v4": 1.228e12,
        "NVIDIA A100": None,
    }
    for kind, rate in kinds.items():
        found = bounds.of_kind(bounds.DEVICES, kind)
        assert (found and found.memory) == rate


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.undo()
    device, whose = bounds.here()
    assert min(device) > 1e6 and whose == "measured, float32"
    assert min(bounds.PRODUCT / bounds.product()(), 1e6 / bounds.reading(1e6)()) > 1e6


def test_outputs_and_gradients_of_half_the_sum_of_squares():
    x, n = jnp.asarray([1.0, 2.0], jnp.float32), jnp.asarray(3, jnp.int32)
    y, gradients = timing.both(lambda x, n: x * n)(x, n)
    np.testing.assert_array_equal(y, [3, 6])
    assert gradients.keys() == {0}
    np.testing.assert_array_equal(gradients[0], [9, 18])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--ops grouped-9", "--ops grouped-9: not one of gla, "),
        ("--implementations palas", "--implementations palas: not one of pallas_tpu, "),
        ("--peers torch", "--peers torch: not one of fla, jla, transformers, torchscale"),
        ("--models gpt", "--models gpt: not one of mamba, "),
        ("--decode 0", "--decode 0 must be at least 1"),
        ("--lengths 8 -1", "--lengths -1 "),
        ("--lengths 4 6", "--lengths 4 does not divide 6, the longest"),
        ("--lengths 4 --ops attention", "--lengths with --ops attention: it is of gla, "),
        ("--out . --compare benchmark.json", "--compare benchmark.json would be replaced"),
        ("--compare /no/such/file", "/no/such/file"),
        ("--compare pyproject.toml", "--compare pyproject.toml: "),
        ("--repeats 0", "--repeats 0 must be at least 1"),
        ("--dtype float16", "float16"),
        ("--out pyproject.toml", "--out pyproject.toml is not a folder"),
    ],
)
def test_a_wrong_flag_is_said_in_a_line(flags, says, capsys):
    assert benchmark.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark: ") and says in line
