"""The benchmark's table has a row for every operation; nothing is asserted about time."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.experiments import benchmark, bounds, peers, timing
from scanax.experiments.problems import problems

SHAPE = ("--batch", "1", "--length", "12", "--heads", "2", "--width", "8", "--repeats", "1")
NUMBERS = {"forward_ms", "forward_bound_ms", "both_ms", "both_bound_ms", "temporaries_mb"}
RATIOS = {"forward_ratio", "both_ratio", "temporaries_ratio"}


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    """Nothing is measured of this machine but where a test asks."""
    monkeypatch.setattr(bounds, "measured", lambda: bounds.Device(1e9, 1e9))


def table(tmp_path, *flags):
    out = tmp_path / "table.json"
    assert benchmark.main([*SHAPE, *flags, "--out", str(out)]) == 0
    return json.loads(out.read_text())["ops"]


@pytest.mark.parametrize("op", ["grouped-8", "grouped-64", "attention", "retention"])
def test_a_row_of_an_operation(op, tmp_path, capsys):
    row = table(tmp_path, "--ops", op)[op]
    assert row.keys() == NUMBERS | RATIOS | {"implementation"}
    assert row.pop("implementation") == "xla"
    assert min(row.values()) > 0
    assert f"| {op} | xla |" in capsys.readouterr().out


def test_rows_of_implementations(tmp_path, capsys):
    """Further ones in the same run; the one that dispatch chose is not timed twice."""
    which = ("xla", "reference", "pallas_tpu")
    rows = table(tmp_path, "--ops", "gla", "--implementations", *which, "--no-baseline")
    ran = {name: row["implementation"] for name, row in rows.items()}
    assert ran == {"gla": "xla", "gla reference": "reference"}
    assert all(rows["gla"][name] is None for name in RATIOS)
    assert "gla pallas_tpu: no implementation of linear_attention takes" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["gla", "mamba2", "retention", "mamba", "aaren", "attention"])
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
    file = tmp_path / "table.md"
    more = ("--dtype", "bfloat16", "--no-baseline", "--markdown", str(file))
    assert benchmark.main([*SHAPE, "--ops", "aaren", *more]) == 0
    about, _, header, rule, row, _, rates = file.read_text().splitlines()
    assert about.startswith(f"cpu, jax {jax.__version__}, 20")
    assert about.endswith("B=1 T=12 H=2 K=V=8 bfloat16")
    assert row.startswith("| aaren | xla |")
    assert header.count("|") == rule.count("|") == row.count("|")
    assert rates.startswith("Bounds: 1e+09 bytes and 1e+09 operations a second")
    assert {about, header, rule, row, rates} == set(capsys.readouterr().out.splitlines())


def test_peers_that_are_not_there_are_said(tmp_path, monkeypatch, capsys):
    """One line each, whatever the number of operations; the rows of the others stay."""
    for module in ("torch", "jla", "jla.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    flags = ("--dtype", "bfloat16", "--no-baseline", "--peers", "fla", "jla")
    assert table(tmp_path, "--ops", "gla", "aaren", *flags).keys() == {"gla", "aaren"}
    fla, jla = capsys.readouterr().err.splitlines()
    assert fla.startswith("fla: it is not installed (") and fla.endswith("attention[cuda]==0.6.*'")
    assert jla.startswith("jla: it is not installed (") and "jax-linear-attention" in jla


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


def test_a_peer_is_a_row(tmp_path, monkeypatch, capsys):
    """And where it computes something else, a line says so."""
    flags = ("--dtype", "bfloat16", "--ops", "gla", "aaren", "--peers", "jla")
    monkeypatch.setitem(sys.modules, "jla", types.SimpleNamespace())
    for factor, differs in ((1, False), (2, True)):
        monkeypatch.setitem(sys.modules, "jla.ops", stand_in(factor))
        row = table(tmp_path, *flags)["gla jla"]
        assert row.pop("implementation") == "xla" and min(row.values()) > 0
        *differences, only = capsys.readouterr().err.splitlines()
        assert only == "jla: it is compared in gla, mamba2, retention, mamba only"
        assert differences == ["gla jla: its outputs differ from ours by 1 of their size"] * differs


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
    for kind, memory in kinds.items():
        found = bounds.of_kind(bounds.DEVICES, kind)
        assert (found and found.memory) == memory


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.undo()
    device, whose = bounds.here()
    assert min(device) > 1e6 and whose == "measured, float32"


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
        ("--peers torch", "--peers torch: not one of fla, jla"),
        ("--peers fla", "--peers: their kernels are for bfloat16; add --dtype bfloat16"),
        ("--repeats 0", "--repeats 0 must be at least 1"),
        ("--dtype float16", "float16"),
        ("--out /no/such/folder/x", "there is no folder /no/such/folder"),
    ],
)
def test_a_wrong_flag_is_said_in_a_line(flags, says, capsys):
    assert benchmark.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark: ") and says in line
