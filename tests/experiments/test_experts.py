"""The model of what experts cost, and the command that prints it."""

import dataclasses

import jax
import numpy as np
import pytest
from scanax.experiments import experts
from scanax.experiments.configs import moe
from scanax.models import LMConfig
from scanax.sharding import mesh
from scanax.sharding.expert_cost import Machine, Work, best, pipelined, table

MACHINE = Machine(1e12, 1e9, 0.0)


def test_slices_hide_what_they_can():
    """No quicker than the link or the device allows, and quicker than one after the other."""
    assert pipelined(1, 2.0, 3.0) == 7.0
    for slices in (2, 4, 8):
        for way, compute in ((1.0, 1.0), (3.0, 0.5), (0.5, 3.0)):
            total = pipelined(slices, way, compute)
            least = max(2 * slices * way, 2 * way + slices * compute)
            assert least <= total < slices * (2 * way + compute)
            assert total <= least + slices * min(way, compute) + way


def test_the_best_degree_goes_with_the_tokens():
    """Few tokens travel to many slices; for many it is cheaper to gather the weights."""
    degrees = []
    for tokens in (2**i for i in range(4, 24)):
        costs = table(16, 2, Work(tokens, 256, 1024, 3, 2), MACHINE)
        every = {(r, n) for r in (1, 2, 4, 8) for n in (1, 2, 4, 8)}
        assert {(c.degree, c.slices) for c in costs} == every | {(0, 1)}
        degrees.append(best([c for c in costs if c.slices == 1]).degree)
    assert degrees[0] == 8 and degrees[-1] == 0 and degrees == sorted(degrees, reverse=True)
    assert len(set(degrees)) >= 3


def test_the_command_prints_a_table_and_a_choice(capsys):
    given = ["moe", "--mesh", "expert=8", "--rows", "8", "--tflops", "1", "--link-gbs", "1"]
    assert experts.main([*given, "--latency-us", "20"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in lines[2:7]] == [["0", "1"], *(["1", n] for n in "1248")]
    degree, slices, *_ = lines[2 + int(np.argmin([float(row[4]) for row in lines[2:7]]))]
    flags = ["--schedule.expert-degree", degree, "--schedule.expert-slices", slices]
    assert lines[-1][-4:] == flags


def test_a_setting_is_timed():
    model = LMConfig(width=8, depth=1, pattern="gla+moe")
    task = dataclasses.replace(moe.config.task, rows=8, length=4, model=model)
    over = mesh.make("expert=8")
    one, *_ = table(8, 8, Work(8, 8, 64, 3, 4), MACHINE)
    with jax.set_mesh(over):
        assert 0 < experts.measured(task, over, one, 1) < 60


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("stdlib --mesh expert=8", "pattern 'mamba+none' has no experts"),
        ("moe", "mesh '' has one device for all experts; try expert=8"),
        ("moe --mesh expert=8", "what a 'cpu' does is not known: give --tflops and --link-gbs"),
        ("moe --mesh expert=8 --tflops 0", "tflops=0.0; it must be more than 0"),
        ("moe --mesh expert=8 --measure --repeats 0", "repeats=0; it must be more than 0"),
        ("moe --mesh expert=8 --tflops 1", "give both --tflops and --link-gbs"),
        ("moe --mesh expert=8 --rows 9", "rows=9 does not divide over expert=8 devices"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(more, says, capsys):
    assert experts.main(more.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("experts: ") and says in line
