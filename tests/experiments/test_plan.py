"""The plan of a step on a mesh: memory that is divided, traffic that is there, work as on one."""

import re

import jax
import pytest
from scanax.experiments import plan


@pytest.fixture(autouse=True, scope="module")
def devices():
    """JAX has found the suite's eight before a plan could ask for other ones."""
    assert len(jax.devices()) == 8


SMALL = ["stdlib", "--rows", "8", "--length", "64"]


def figures(capsys, *more):
    assert plan.main([*SMALL, *more]) == 0
    return capsys.readouterr().out


def test_memory_is_divided_and_traffic_is_named(capsys):
    alone, spread = figures(capsys), figures(capsys, "--mesh", "fsdp=8")
    assert "512 tokens a step, 1 device;" in alone and "8 devices;" in spread
    found = [re.search(r"optimizer state +([\d.]+) MB", text) for text in (alone, spread)]
    one, eighth = (float(match[1]) for match in found if match)
    assert 7 < one / eighth <= 8.1  # what is small lies on every device
    assert not re.search(r"all-|permute", alone)
    assert re.search(r"all-gather +[\d.]+ MB received in \d+ calls", spread)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nothing", "'nothing' is not one of"),
        ("stdlib --mesh width=2", "'width=2' is not AXIS=N"),
        ("stdlib --mesh seq=3", "length=256 does not divide over seq=3 devices; 255 or 258"),
        ("stdlib --rows 0", "rows=0"),
        ("stdlib --mesh data=16", "emulate_devices=16, but JAX already runs on 8 devices"),
    ],
)
def test_a_wrong_line_is_said(line, says, capsys):
    assert plan.main(line.split()) == 2
    assert re.fullmatch(rf"plan: .*{says}.*\n", capsys.readouterr().err)
