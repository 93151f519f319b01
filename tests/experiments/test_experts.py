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


def test_a_device_has_some_of_the_tokens(capsys):
    few = "moe --mesh tensor=4 --rows 1 --length 3 --tflops 1 --link-gbs 1"
    assert experts.main(few.split()) == 0
    assert capsys.readouterr().out.startswith("4 devices, 8 experts, 2 assignments")


def test_a_setting_is_timed():
    model = LMConfig(width=8, depth=1, pattern="gla+moe")
    task = dataclasses.replace(moe.config.task, rows=8, length=4, model=model)
    over = mesh.make("expert=8")
    one, *_ = table(8, 8, Work(8, 8, 64, 3, 4), MACHINE)
    with jax.set_mesh(over):
        assert 0 < experts.measured(task, over, one, 1) < 60


class Device:
    def __init__(self, kind):
        self.device_kind = kind


def test_what_is_published_of_a_device(monkeypatch):
    """Of its own kind, not of one whose name begins alike; flags change one number each."""

    def found(kind, **given):
        monkeypatch.setattr(experts.jax, "devices", lambda: [Device(kind)])
        return experts.machine_of(experts.Experts("moe", **given))

    assert found("TPU v5 lite") == experts.MACHINES["TPU v5 lite"]
    assert found("TPU v5") == found("TPU v5p") == experts.MACHINES["TPU v5"]
    assert found("NVIDIA H100 80GB HBM3") == experts.MACHINES["NVIDIA H100 80GB HBM3"]
    assert found("cpu") is None
    assert found("TPU v4", latency_us=9.0) == experts.MACHINES["TPU v4"]._replace(latency=9e-6)
    assert found("TPU v4", link_gbs=1.0) == experts.MACHINES["TPU v4"]._replace(link=1e9)
    assert found("cpu", tflops=1.0, link_gbs=2.0) == Machine(1e12, 2e9, 5e-6)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("stdlib --mesh expert=8", "pattern 'mamba+none' has no experts"),
        ("moe", "mesh '' has one device for all experts; try expert=8"),
        ("moe --mesh expert=8", "what a 'cpu' does is not known: give --tflops and --link-gbs"),
        ("moe --mesh expert=8 --tflops 0", "tflops=0.0; it must be more than 0"),
        ("moe --mesh expert=8 --measure --repeats 0", "repeats=0; it must be more than 0"),
        ("moe --mesh expert=8 --tflops 1 --link-gbs 1 --repeats 3", "repeats=3 is for --measure"),
        ("moe --mesh expert=8 --measure --latency-us 9", "give both --tflops and --link-gbs"),
        ("moe --mesh expert=8 --tflops 1 --link-gbs 1 --latency-us -1", "latency_us=-1.0; it must"),
        ("moe --mesh expert=8 --emulate-devices -1", "emulate_devices=-1; it must be 0 or more"),
        ("moe --mesh expert=4,pipe=2 --tflops 1 --link-gbs 1", "mesh pipe=2: only data, expert"),
        ("moe --accumulate 2", "Unrecognized options: --accumulate"),
        ("moe --schedule.expert-degree 0", "Unrecognized options: --schedule.expert-degree"),
        ("moe --data.paths x", "Unrecognized options: --data.paths"),
        ("moe --mesh expert=8 --tflops 1", "give both --tflops and --link-gbs"),
        ("moe --mesh expert=8 --rows 9", "rows=9 does not divide over expert=8 devices"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(more, says, capsys):
    assert experts.main(more.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("experts: ") and says in line
