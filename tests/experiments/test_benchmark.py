"""The benchmark's table has a row for every operation; nothing is asserted about time."""

import json
import sys

import pytest
from scanax.experiments import benchmark


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    benchmark.main()


@pytest.mark.parametrize("op", ["grouped-8", "grouped-64"])
def test_rows_of_grouped_matmuls(op, monkeypatch, tmp_path, capsys):
    out = tmp_path / "table.json"
    shape = ("--batch", "1", "--length", "12", "--repeats", "1")
    run(monkeypatch, "--ops", op, *shape, "--out", str(out))
    row = json.loads(out.read_text())["ops"][op]
    assert row.keys() >= {"forward_ms", "both_ms", "both_ratio", "temporaries_ratio"}
    assert min(row.values()) > 0
    assert f"| {op} |" in capsys.readouterr().out


def test_an_unknown_operation_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--ops", "grouped-9")
    assert ended.value.code == 2
    assert "--ops grouped-9: not one of gla, " in capsys.readouterr().err
