"""Checkpoints: what is saved comes back exactly, and nothing that happens to one is silent."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.experiments.checkpoint import (
    CheckpointError,
    best,
    latest,
    load_config,
    load_file,
    restore,
    steps,
)
from scanax.experiments.saving import SaveError, Saver, alone

pytestmark = pytest.mark.core


def state(value, size=5000):
    noise = np.random.default_rng(value).normal(size=size)
    return {
        "params": {"layers.0.kernel": jnp.asarray(noise, jnp.float32), "none": jnp.zeros((2, 0))},
        "optimizer": (jnp.full((3,), value, jnp.bfloat16), {}, None),
        "count": np.int32(value),
    }


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_states_come_back_and_the_last_and_the_best_are_kept(tmp_path):
    saver = Saver(tmp_path, {"width": 8}, keep=2, files={"tokenizer.json": "{}"})
    for step, metric in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 1.5)):
        saver.save(step, state(step), {"skipped": step // 10}, metric=metric)
    saver.wait()
    assert steps(tmp_path) == [20, 40, 50] and latest(tmp_path) == 50 and best(tmp_path) == 20
    assert load_config(tmp_path) == json.loads((tmp_path / "20/config.json").read_text())
    assert load_config(tmp_path) == {"width": 8} and load_file(tmp_path, "tokenizer.json") == "{}"
    target = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state(0)))
    for step in (None, 20):
        found = restore(tmp_path, target, step)
        assert found.step == (step or 50) and found.metadata == {"skipped": found.step // 10}
        same(found.state, state(found.step))
        types = [jax.tree.map(lambda x: x.dtype, tree) for tree in (found.state, target)]
        assert types[0] == types[1]
    part = restore(tmp_path, {"params": target["params"]}, part=True)
    same(part.state, {"params": state(50)["params"]})

    with pytest.raises(ValueError, match="step=50 does not come after 50"):
        saver.save(50, state(50))
    with pytest.raises(ValueError, match="already holds checkpoints up to step 50"):
        Saver(tmp_path, {})
    # A run that goes on from 20 replaces what came after 20, and only that.
    (tmp_path / "60.saving").mkdir()
    saver = Saver(tmp_path, {}, keep=2, resumed=20)
    assert not (tmp_path / "60.saving").exists()
    saver.save(25, state(25), metric=1.2)
    saver.wait()
    assert steps(tmp_path) == [20, 25]


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    x = jax.block_until_ready(double(jnp.asarray(np.random.default_rng(0).normal(size=1 << 20))))
    before = np.array(x)
    del x
    x = double(jnp.asarray(before / 2))
    saver = Saver(tmp_path, {})
    saver.save(1, {"x": x})
    for _ in range(5):
        x = double(x)
    saver.wait()
    same(restore(tmp_path, {"x": x}).state["x"], before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    saver = Saver(directory, {"width": 8})
    for step in (1, 2):
        saver.save(step, state(step))
    saver.wait()
    return directory


def _largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "contents of": lambda folder: _flip(_largest(folder)),
    "bytes of": lambda folder: os.truncate(_largest(folder), 100),
    "is missing": lambda folder: _largest(folder).unlink(),
    "manifest.json": lambda folder: _flip(folder / "manifest.json"),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_is_named_and_the_one_before_offered(saved, tmp_path, said):
    subprocess.run(["cp", "-r", *map(str, saved.iterdir()), str(tmp_path)], check=True)
    DAMAGE[said](tmp_path / "2")
    with pytest.raises(CheckpointError, match=f"(?s)/2 is damaged.*{said}.*--step 1") as caught:
        restore(tmp_path, state(0))
    assert caught.value.previous == 1
    same(restore(tmp_path, state(0), caught.value.previous).state, state(1))
    DAMAGE[said](tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"/1 is damaged.*none before it") as caught:
        restore(tmp_path, state(0), 1)
    assert caught.value.previous is None


def test_what_is_no_checkpoint_or_another_model_is_said(saved, tmp_path):
    for directory, said in (
        (tmp_path, "is no checkpoint directory"),
        (tmp_path / "absent", "no such directory"),
        (saved / "2", "it is one checkpoint; name .* and step 2"),
    ):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(directory))}.*{said}"):
            restore(directory, state(0))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has: 1, 2"):
        restore(saved, state(0), 7)
    other = state(0, size=4999)
    with pytest.raises(
        CheckpointError, match=r"0.kernel is float32\[5000\] there, float32\[4999\]"
    ):
        restore(saved, other)
    other = {**state(0), "count": np.float32(0)}
    with pytest.raises(CheckpointError, match=r"count is int32.* there, float32"):
        restore(saved, other)
    with pytest.raises(CheckpointError, match="has no extra: give the config"):
        restore(saved, {**state(0), "extra": jnp.zeros(1)})
    with pytest.raises(CheckpointError, match="has count, not asked for: give the config"):
        restore(saved, {k: v for k, v in state(0).items() if k != "count"})


KILLED = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp
from scanax.experiments.checkpoint import steps
from scanax.experiments.saving import Saver

for round_ in range(4):  # the parent never starts a backend, so that it may fork
    directory = os.path.join(sys.argv[1], str(round_))
    child = os.fork()
    if child == 0:
        saver, step = Saver(directory, {"width": 8}, keep=2), 0
        while True:
            step += 1
            saver.save(step, {"x": jnp.full((400, 1000), step, jnp.float32) + jnp.arange(1000)})
    while not steps(directory):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kill_9_leaves_a_usable_latest(tmp_path):
    run(KILLED, tmp_path)
    for round_ in range(4):
        directory = tmp_path / str(round_)
        found = restore(directory, {"x": jax.ShapeDtypeStruct((400, 1000), jnp.float32)})
        same(found.state["x"], np.broadcast_to(found.step + np.arange(1000.0), (400, 1000)))
        saver = Saver(directory, {}, resumed=found.step)
        assert all(name.isdecimal() for name in os.listdir(directory))
        saver.save(found.step + 1, {"x": found.state["x"]})
        saver.wait()
        assert latest(directory) == found.step + 1


FULL = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from scanax.experiments.checkpoint import restore, steps
from scanax.experiments.saving import Saver, SaveError

x = jax.random.normal(jax.random.key(0), (400, 1000), jnp.float32)
over = NamedSharding(jax.make_mesh((2, 2), ("a", "b")), P("a", "b"))
saver = Saver(sys.argv[1], {"width": 8})
saver.save(1, {"x": jax.device_put(x, over)})
saver.wait()
for spec in (P("b"), P(None, "a"), P()):
    sharding = NamedSharding(over.mesh, spec)
    found = restore(sys.argv[1], {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)})
    assert found.state["x"].sharding == sharding and (np.asarray(found.state["x"]) == x).all()

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for surface in (saver.wait, lambda: saver.save(3, {"x": x})):
    saver.save(2, {"x": x})
    try:
        surface()
        raise SystemExit("the save did not fail")
    except SaveError as error:
        print(error)
    assert steps(sys.argv[1]) == [1]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
saver.save(4, {"x": x})
saver.wait()
assert (np.asarray(restore(sys.argv[1], {"x": x}).state["x"]) == x).all()
assert steps(sys.argv[1]) == [1, 4]
"""


def test_full_disk_is_said_and_shardings_may_change(tmp_path):
    out = run(FULL, tmp_path)
    line = "could not be saved: the disk is full or a file size limit was reached (the arrays take"
    assert out.stdout.count(line) == 2 and out.stdout.count("complete checkpoint is step 1") == 2
    assert "1.6 MB" in out.stdout and "Traceback" not in out.stderr


def test_errors_that_are_no_full_disk_surface_too(tmp_path):
    (tmp_path / "run").write_text("a file where the directory should be")
    with pytest.raises(SaveError, match="run/1 could not be saved: FileExistsError"):
        Saver(tmp_path / "run", {}).save(1, {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match="x is a int; a state's leaves are arrays"):
        Saver(tmp_path / "other", {}).save(1, {"x": 3})


def run(script, directory):
    flags = "--xla_force_host_platform_device_count=4"
    out = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    return out


def test_a_folder_has_one_trainer(tmp_path):
    taken = pytest.raises(ValueError, match=r"another process trains in .*: stop it, or wait")
    with alone(tmp_path), taken, alone(tmp_path):
        pytest.fail("two of them")
    with alone(tmp_path):
        pass
