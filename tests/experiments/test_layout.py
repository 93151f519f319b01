"""XLA finds a way between where things lie: no array is made whole on every device on the way."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from scanax.experiments import step as steps
from scanax.experiments.optimizer import OptimizerConfig, adamw
from scanax.experiments.tasks.lm import LMTask
from scanax.layers.gla import GLAConfig
from scanax.layers.mamba2 import Mamba2Config
from scanax.models import LMConfig
from scanax.sharding import mesh
from scanax.sharding.schedule import PLAIN, Schedule

# What XLA decides is looked at, not the code that LLVM makes of it.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WARNING = "Involuntary full rematerialization"
MODEL = LMConfig(
    vocab=48,
    width=32,
    depth=4,
    pattern="gla+swiglu,mamba2,attention+swiglu,mamba",
    gla=GLAConfig(conv=4),
    mamba2=Mamba2Config(head_width=8, state=4),
    loss_chunk=40,
)


@contextlib.contextmanager
def afresh():
    """Programs are compiled, not taken from the cache, so that what XLA says is heard."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def test_a_bad_layout_would_be_heard(capfd):
    over = mesh.make("data=2,seq=2,tensor=2")

    def bad(x):
        x = jnp.tanh(jax.lax.with_sharding_constraint(x, jax.P("tensor")))
        return jax.lax.with_sharding_constraint(x, jax.P(None, "data", "seq"))

    with jax.set_mesh(over), afresh():
        jax.jit(bad).lower(jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)).compile()
    assert WARNING in capfd.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "over", "how"),
    [
        (MODEL.pattern, "data=2,seq=2,tensor=2", PLAIN),
        (MODEL.pattern, "fsdp=2,seq=2,tensor=2", Schedule(matmul="ring", attention="ring")),
        ("mamba2,attention+swiglu", "pipe=2,fsdp=2,tensor=2", PLAIN),
        ("gla+moe", "expert=2,fsdp=2,tensor=2", PLAIN),
    ],
)
def test_a_training_step_is_laid_out_well(pattern, over, how, capfd, monkeypatch):
    """Without a warning, and gradients cut as their parameters where the optimizer takes them."""
    lying = {}

    def heard(config, decayed):
        inner = adamw(config, decayed)

        def update(grads, state, params):
            for path, x in jax.tree.leaves_with_path(grads):
                jax.debug.inspect_array_sharding(
                    x, callback=functools.partial(lying.setdefault, path)
                )
            return inner.update(grads, state, params)

        return inner._replace(update=update)

    monkeypatch.setattr(steps, "adamw", heard)
    model = LMConfig(**vars(MODEL) | {"pattern": pattern})
    with afresh():
        compiled(model, over, how)
    assert WARNING not in capfd.readouterr().err
    made = mesh.make(over)
    task = LMTask(model=model, rows=16, length=32).on(made, how)
    _, shapes, places = steps.blueprint(task, made)
    cut = 0
    for (path, x), place in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(places), strict=True
    ):
        assert lying[path].shard_shape(x.shape) == place.shard_shape(x.shape), path
        cut += place.shard_shape(x.shape) != x.shape
    assert cut > len(lying) / 2


def compiled(model, over, how, length=32):
    """A training step, and nothing allocated."""
    task, made = LMTask(model=model, rows=16, length=length), mesh.make(over)
    program, state = steps.abstract(task, OptimizerConfig(), 1, made, how)
    kinds = {"tokens": np.int32, "targets": np.int32, "reset": bool, "weights": np.float32}
    batch = {
        name: jax.ShapeDtypeStruct((16, length), kind, sharding=program.rows)
        for name, kind in kinds.items()
    }
    return program.step.lower(state, program.rest, batch, *steps.SCALARS).compile(QUICKLY)


def test_a_pipeline_keeps_of_its_blocks_what_remat_says():
    model = LMConfig(vocab=8, width=32, depth=4, pattern="gla+swiglu")
    temporary = {
        remat: compiled(
            LMConfig(**vars(model) | {"remat": remat}), "pipe=2", Schedule(microbatches=8), 256
        )
        .memory_analysis()
        .temp_size_in_bytes
        for remat in ("none", "full")
    }
    assert temporary["full"] < temporary["none"] / 2


def test_no_tick_of_a_pipeline_keeps_the_weights_it_took():
    model = LMConfig(vocab=8, width=256, depth=4, pattern="gla+swiglu")
    once, twice = (
        compiled(model, "pipe=2", Schedule(rounds=rounds, microbatches=8)).memory_analysis()
        for rounds in (1, 2)
    )
    weights = once.argument_size_in_bytes / 3  # beside Adam's two moments
    assert twice.temp_size_in_bytes < once.temp_size_in_bytes + weights
