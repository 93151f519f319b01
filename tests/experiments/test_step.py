"""The training step: parts add up, what is not finite is skipped, a state streams."""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.experiments import flags
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.step import SCALARS, build
from scanax.experiments.tasks import Task
from scanax.sharding import mesh
from support.compare import close
from support.runs import STREAM, args

NOW = np.float32(0.1), np.zeros(2, np.uint32)


@dataclasses.dataclass(frozen=True)
class Root(Task):
    """A task of one weight: the loss is the root of weight times input, plus a running sum."""

    unit: ClassVar[str] = "numbers"
    rows: ClassVar[int] = 4

    def on(self, over, how):
        return self

    def build(self, rngs):
        model = nnx.Module()
        model.kernel = nnx.Param(jnp.ones((3,), jnp.float32))
        return model

    def init_state(self, model):
        return jnp.zeros((4,), jnp.float32)

    def shardings(self, params, over):
        return jax.tree.map(lambda _: mesh.sharding(over), params)

    def state_shardings(self, state, over):
        return self.shardings(state, over)

    def settled(self, params, metrics):
        return params

    def by_layer(self, params):
        return params

    def decayed(self, params):
        return jax.tree.map(lambda _: True, params)

    def loss(self, model, batch, state, key=None):
        x, weights = batch["x"], batch["weights"]
        root = jnp.sqrt(x @ model.kernel[...]) + state
        weight = weights.sum()
        loss = (root * weights).sum() / jnp.where(weight, weight, 1)
        return loss, (state + x.sum(1), {"loss": loss, "weight": weight})


def test_a_split_batch_gives_the_unsplit_update():
    """Also where a part has less weight than another, or none."""
    rng = np.random.default_rng(1)
    batch = {"x": rng.uniform(1, 2, (4, 3)), "weights": np.array([1.0, 1.0, 0.0, 0.5])}
    batch = jax.tree.map(lambda x: x.astype(np.float32), batch)
    results = []
    for parts in (1, 2, 4):
        program, state = build(Root(), OptimizerConfig(), 0, parts)
        for _ in range(3):
            state, numbers = program.step(state, program.rest, batch, *NOW)
        state["stream"] = state["stream"].reshape(4)
        results.append((state, numbers))
    for other in results[1:]:
        close(other, results[0], 1e-6)
    assert results[0][1]["weight"] == 2.5


@pytest.mark.parametrize("bad", [np.nan, 0.0], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    """nan makes the loss nan; at 0 the root is finite and its slope is not."""
    program, state = build(Root(), OptimizerConfig(), 0, 1)
    good = {"x": np.ones((4, 3), np.float32), "weights": np.ones(4, np.float32)}
    state, _ = program.step(state, program.rest, good, *NOW)
    before = jax.device_get(state)
    x = good["x"].copy()
    x[2] = bad
    state, numbers = program.step(state, program.rest, good | {"x": x}, *NOW)
    assert np.isfinite(numbers["loss"]) == (bad == 0)
    after = jax.device_get(state)
    assert after.pop("skipped") == before.pop("skipped") + 1 == numbers["skipped"]
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))
    state, numbers = program.step(state, program.rest, good, *NOW)
    assert numbers["skipped"] == 1 and not np.array_equal(state["stream"], before["stream"])


def test_streaming_reads_the_text_as_one_long_sequence(texts):
    """Two steps' losses, the state carried, are the loss of one step of twice the length."""
    task = flags.train(args(texts, "none", STREAM)).task
    model, long = task.build(nnx.Rngs(0)), dataclasses.replace(task, length=24)
    # where a document begins inside a row
    at = next(i for i in range(1000) if long.batches(3, i)["reset"][:, 1:].any())
    loss = nnx.jit(lambda model, batch, state: task.loss(model, batch, state)[1])
    whole, numbers = loss(model, long.batches(3, at), task.init_state(model))
    state, total, weight = task.init_state(model), 0.0, 0.0
    for step in (2 * at, 2 * at + 1):
        state, part = loss(model, task.batches(3, step), state)
        total += part["loss"] * part["weight"]
        weight += part["weight"]
    assert weight == numbers["weight"] < 4 * 24  # a document's last target does not count
    close((state, total / weight), (whole, numbers["loss"]), 1e-5)


def test_bfloat16_computes_with_float32_masters(texts):
    task = flags.train(args(texts, "none", "--model.dtype bfloat16")).task
    program, state = build(task, OptimizerConfig(), 0, 1)
    after, numbers = jax.eval_shape(program.step, state, program.rest, task.batches(0, 0), *SCALARS)
    kinds = {x.dtype for x in jax.tree.leaves((after["params"], after["optimizer"][1].mu))}
    assert kinds == {jnp.dtype(jnp.float32)} and numbers["loss"].dtype == jnp.float32
    text = program.step.lower(state, program.rest, task.batches(0, 0), *SCALARS).as_text()
    assert re.search(r"dot_general.*bf16", text)
