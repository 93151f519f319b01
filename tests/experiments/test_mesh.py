"""Training on a mesh is training on one device, and a checkpoint fits any other mesh."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from scanax.experiments import checkpoint, flags, metrics, train
from support.compare import close
from support.runs import args

STREAMING = "--stream-state --model.pattern gla+swiglu,mamba --accumulate 2 "


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    """A run's losses on one device."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main([*args(texts, folder, STREAMING), "--steps", "10"]) == 0
    return [row["loss"] for row in metrics.read(folder)]


def lying(run):
    """Everything is where its rule says."""
    for x, place in zip(*map(jax.tree.leaves, (run.state, run.program.places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.parametrize("over", ["data=2,seq=2,tensor=2", "fsdp=2,seq=4"])
def test_ten_steps_are_those_of_one_device(over, alone, texts, tmp_path):
    run = train.prepare(
        flags.train([*args(texts, tmp_path / "r", STREAMING), "--steps", "10", "--mesh", over])
    )
    lying(run)  # from the start
    train.train(run)
    close(np.array([row["loss"] for row in metrics.read(tmp_path / "r")]), np.array(alone), 1e-5)
    lying(run)
    kernel = run.state["params"]["blocks"][0]["mlp"]["down"]["kernel"]
    moment = run.state["optimizer"][1].nu["blocks"][0]["mlp"]["down"]["kernel"]
    parts = 2  # over tensor or over fsdp
    for x in (kernel, moment):
        assert {s.data.size for s in x.addressable_shards} == {x.size // parts}
    assert run.program.step._cache_size() == 1


def test_a_checkpoint_goes_on_on_another_mesh(texts, tmp_path):
    first = [*args(texts, tmp_path / "r"), "--steps", "2", "--mesh", "data=4,seq=2"]
    assert train.main(first) == 0
    about = checkpoint.manifest(tmp_path / "r", 2)["arrays"]
    target = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in about.items()}
    saved = checkpoint.restore(tmp_path / "r", target, 2).state
    for over in ("tensor=2", "expert=2,fsdp=2", ""):
        resume = ["--resume", "--run", str(tmp_path / "r"), "--steps", "3", "--mesh", over]
        run = train.prepare(flags.train(resume))
        flat = run.config.task.by_layer(run.state["params"])
        for name, leaf in flat.items():
            np.testing.assert_array_equal(leaf, saved[f"params.{name}"])
    train.train(run)
    assert checkpoint.latest(tmp_path / "r") == 3


def test_devices_are_emulated_by_a_flag(texts, tmp_path):
    more = ["--steps", "2", "--mesh", "seq=3", "--emulate-devices", "3"]
    command = [sys.executable, train.__file__, *args(texts, tmp_path / "r"), *more]
    bare = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte" in done.stdout


def test_a_pipeline_trains_as_one_device_and_goes_on_without_one(texts, tmp_path):
    """Its checkpoint is by layer, so that a run without stages takes it up to the bit."""
    blocks = "--model.pattern gla --model.depth 4 "
    losses = {}
    for name, more in (("alone", []), ("staged", ["--mesh", "pipe=2,data=2", *ROUNDS])):
        assert train.main([*args(texts, tmp_path / name, blocks), "--steps", "10", *more]) == 0
        losses[name] = np.array([row["loss"] for row in metrics.read(tmp_path / name)])
    close(losses["staged"], losses["alone"], 1e-5)
    saved = {}
    for mesh in ("pipe=2,data=2", ""):
        how = ROUNDS if mesh else ["--schedule.rounds", "1", "--schedule.microbatches", "0"]
        resume = ["--resume", "--run", str(tmp_path / "staged"), "--steps", "11", "--mesh", mesh]
        run = train.prepare(flags.train([*resume, *how]))
        saved[mesh] = run.program.task.by_layer(run.state["params"])
    jax.tree.map(np.testing.assert_array_equal, *saved.values())


ROUNDS = ["--schedule.rounds", "2", "--schedule.microbatches", "2"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--schedule.rounds 2", "schedule.rounds=2 is for a mesh with pipe=2 or more"),
        (
            "--mesh pipe=2 --model.pattern gla,mamba",
            "pipe=2 with rounds=1 makes parts of 1 blocks, which must be alike: block 1 (mamba) is "
            "not like block 0 (gla)",
        ),
        (
            "--mesh pipe=2 --schedule.microbatches 3",
            "microbatches=3 does not divide over pipe=2 devices; 2 or 4 would",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_is_said_in_a_line(more, says, texts, tmp_path, capsys):
    command = [*args(texts, tmp_path / "r", "--model.depth 2 "), *more.split(), "--steps", "1"]
    assert train.main(command) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"train: {says}"
    assert not (tmp_path / "r").exists()


def test_a_stage_holds_no_other_ones_blocks_while_it_saves(texts, tmp_path):
    blocks = "--model.pattern gla --model.depth 4 --model.tie-head "
    run = train.prepare(
        flags.train([*args(texts, tmp_path / "r", blocks), "--steps", "1", "--mesh", "pipe=4"])
    )
    saved = run.program.named(run.state)["params"]
    for name, x in saved.items():
        if x.ndim == 2 and name.startswith("layers."):
            assert {s.data.size for s in x.addressable_shards} == {x.size // 4}, name
