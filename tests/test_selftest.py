"""The check of an installation passes here, says what does not run, and finds a wrong number."""

import sys

import jax
import jax.numpy as jnp
import pytest
from scanax import selftest
from scanax.kernels.dispatch import Implementation


def rows(text, by):
    return [line for line in text.splitlines() if line[35:].split()[:1] == [by]]


def test_every_implementation_has_a_row(capsys):
    assert selftest.main(["--only", "grouped"]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}, {len(jax.devices())} x cpu" in text
    for name in selftest.IMPLEMENTATIONS["grouped_matmul"]:
        assert rows(text, name), name
    refused, interpreted = rows(text, "megablox")[:2]
    assert refused.endswith("it runs on TPUs, and this is cpu")
    assert "interpreted" in interpreted and interpreted.endswith("ok")
    assert "0 over their bar" in text


def test_a_sequence_over_all_devices(capsys):
    assert selftest.main(["--only", "fixed_query"]) == 0
    assert [line.split()[-1] for line in rows(capsys.readouterr().out, "over")] == ["ok", "ok"]


def test_a_wrong_number_is_found(capsys, monkeypatch):
    module = sys.modules["scanax.kernels.selective_scan"]
    right = module.IMPLEMENTATIONS["xla"].run

    def wrong(*args):
        y, state = right(*args)
        return y.at[0, -1, 0].add(1e-2 * jnp.abs(y).max()), state

    forms = {"xla": Implementation(wrong), "reference": module.IMPLEMENTATIONS["reference"]}
    monkeypatch.setattr(module, "IMPLEMENTATIONS", forms)
    monkeypatch.setitem(selftest.IMPLEMENTATIONS, "selective_scan", forms)
    assert selftest.main(["--only", "selective"]) == 1
    (row, _) = rows(capsys.readouterr().out, "xla")
    assert "OVER ITS BAR" in row


def test_an_unknown_operation_is_named(capsys):
    assert selftest.main(["--only", "gla"]) == 2
    assert "selftest: --only gla: part of none of linear_attention" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["--mixer", "gla"]], ids=["operations", "a mixer"])
@pytest.mark.parametrize("error", [RuntimeError("no 'tpu'\nmore"), AssertionError()], ids=type)
def test_a_platform_that_is_not_there_is_said(args, error, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    assert selftest.main(args) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("selftest: JAX has no devices: ")
    assert said.err.count("\n") == 1 and "JAX_PLATFORMS=cpu" in said.err


def test_a_cpu_that_is_hidden_is_said(capsys, monkeypatch):
    found = jax.devices()

    def devices(platform=None):
        if platform == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return found

    monkeypatch.setattr(jax, "devices", devices)
    assert selftest.main([]) == 2
    said = capsys.readouterr()
    assert not said.out and "selftest: the answers are computed on the CPU" in said.err
    assert said.err.count("\n") == 1 and ",cpu" in said.err


@pytest.mark.parametrize("name", selftest.IMPLEMENTATIONS)
def test_every_operation_has_a_case(name):
    assert name in {op for _, op, _, _ in selftest.cases()}
