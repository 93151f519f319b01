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


@pytest.mark.parametrize("name", selftest.IMPLEMENTATIONS)
def test_every_operation_has_a_case(name):
    assert name in {op for _, op, _, _ in selftest.cases()}
