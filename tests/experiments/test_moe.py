"""Experts in the trainer: one device or eight, what is logged, and checkpoints between meshes."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.experiments import checkpoint, evaluate, flags, metrics, step, train
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.lm import LMTask
from scanax.layers.attention import AttentionConfig
from scanax.layers.mlp import MLPConfig
from scanax.layers.moe import MoEConfig
from scanax.models import LMConfig
from scanax.sharding import mesh
from support.compare import close
from support.runs import args

EXPERTS = "--rows 8 --model.pattern gla+moe --model.mlp.hidden 16 "
SIGMOID = EXPERTS + "--model.moe.router.kind sigmoid --accumulate 2 --model.moe.experts 4 "


def rows(folder, name):
    return np.array([row[name] for row in metrics.read(folder)])


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    """Ten steps on one device."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main([*args(texts, folder, EXPERTS), "--steps", "10"]) == 0
    return folder


def test_ten_steps_over_eight_devices_are_those_of_one(alone, texts, tmp_path):
    run = train.prepare(
        flags.train([*args(texts, tmp_path / "r", EXPERTS), "--steps", "10", "--mesh", "expert=8"])
    )
    up = run.state["params"]["blocks"][0]["mlp"]["up"]
    moment = run.state["optimizer"][1].nu["blocks"][0]["mlp"]["up"]
    for x in (up, moment):
        assert {s.data.size for s in x.addressable_shards} == {x.size // 8}
    train.train(run)
    for name, bar in (("loss", 1e-5), ("moe_balance", 1e-5), ("moe_load", 1e-5)):
        close(rows(tmp_path / "r", name), rows(alone, name), bar)
    # another number of experts on a device, from the same arrays
    about = checkpoint.manifest(tmp_path / "r", 10)["arrays"]
    target = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in about.items()}
    saved = checkpoint.restore(tmp_path / "r", target, 10).state
    for over in ("expert=2,tensor=2", ""):
        resume = ["--resume", "--run", str(tmp_path / "r"), "--steps", "11", "--mesh", over]
        resumed = train.prepare(flags.train(resume))
        for name, leaf in resumed.program.task.by_layer(resumed.state["params"]).items():
            np.testing.assert_array_equal(leaf, saved[f"params.{name}"])


def test_a_checkpoint_goes_on_over_other_devices(texts, tmp_path):
    """As it would have gone on over its own, and it is worth as much."""
    folders = [tmp_path / name for name in "abc"]
    begin = [*args(texts, folders[0], EXPERTS), "--steps", "1", "--mesh", "expert=8"]
    assert train.main(begin) == 0
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    found = []
    for folder, over in zip(folders, ("expert=8", "expert=2,tensor=2", ""), strict=True):
        resume = ["--resume", "--run", str(folder), "--steps", "2", "--mesh", over]
        assert train.main(resume) == 0
        how = evaluate.EvaluateConfig(str(folder), lengths=(1,), tokens=200, plot=False, mesh=over)
        (measured,) = evaluate.evaluate(how)["lengths"]
        last = metrics.read(folder)[-1]
        numbers = [last[name] for name in ("step", "loss", "moe_z", "moe_load", "heldout_loss")]
        found.append([np.array(x) for x in (*numbers, measured["nats_per_token"])])
    assert found[0][0] == 2
    close(found[1:], [found[0]] * 2, 1e-5)


def test_what_is_logged(alone):
    load = rows(alone, "moe_load")
    assert load.shape[2] == 8 and (load >= 0).all()
    close(load.sum(2), np.ones(load.shape[:2]), 1e-6)
    close(rows(alone, "moe_max_load"), load.max((1, 2)) * 8, 1e-6)
    assert (rows(alone, "moe_dropped") == 0).all()
    entropy = rows(alone, "moe_entropy")
    assert (entropy > 0).all() and (entropy <= np.log(8) + 1e-6).all()


def test_a_bias_moves_in_training_and_is_kept(texts, tmp_path):
    run = train.prepare(flags.train([*args(texts, tmp_path / "r", SIGMOID), "--steps", "2"]))
    train.train(run)
    bias = run.state["params"]["blocks"][0]["mlp"]["router"]["bias"]
    load = rows(tmp_path / "r", "moe_load")
    short = np.where(np.abs(load - 1 / 4) > 1e-6, 1 / 4 - load, 0)
    close(bias, 1e-3 * np.sign(short).sum(0), 1e-6)
    again = train.prepare(
        flags.train(
            ["--resume", "--run", str(tmp_path / "r"), "--steps", "3", "--mesh", "tensor=2"]
        )
    )
    router = again.state["params"]["blocks"][0]["mlp"]["router"]
    np.testing.assert_array_equal(router["bias"], bias)


def test_a_capacity_drops_in_training_only(texts, tmp_path):
    more = EXPERTS + "--model.moe.capacity 0.5 --model.moe.priority score "
    assert train.main([*args(texts, tmp_path / "r", more), "--steps", "2"]) == 0
    assert (rows(tmp_path / "r", "moe_dropped") > 0.2).all()
    command = ["--checkpoint", str(tmp_path / "r"), "--tokens", "200", "--no-plot"]
    assert evaluate.main([*command, "--mesh", "expert=2"]) == 0


def test_what_a_router_cannot_do_is_said_in_a_line(texts, tmp_path, capsys):
    more = "--model.moe.router.kind expert-choice "
    assert train.main([*args(texts, tmp_path / "r", EXPERTS + more), "--steps", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("train: moe.router.kind=expert-choice lets a later token")
    more = "--rows 6 --mesh expert=3 "
    assert train.main([*args(texts, tmp_path / "r", EXPERTS + more), "--steps", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line == "train: experts=8 does not divide over expert=3 devices; 6 or 9 would"


def temporaries(pattern):
    """Bytes of a training step of two blocks; an expert is as wide as the dense network."""
    sizes = {"vocab": 64, "width": 32, "depth": 2, "mlp": MLPConfig(hidden=64)}
    own = {"moe": MoEConfig(experts=8), "attention": AttentionConfig(heads=4)}
    task = LMTask(rows=2, length=512, model=LMConfig(pattern=pattern, **sizes, **own))
    start, program = step.compiled(task, OptimizerConfig(), 1, mesh.make(), step.PLAIN)
    state, rest = jax.eval_shape(start, jax.random.key(0), None)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "reset": bool, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((2, 512), kind) for name, kind in kinds.items()}
    lowered = program.step.lower(state, rest, batch, *step.SCALARS)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_a_step_of_experts_takes_the_memory_of_what_they_compute():
    """Two experts a token: at most what a dense network twice as wide would keep, and the like."""
    assert temporaries("attention+moe") < 2 * temporaries("attention+swiglu")
