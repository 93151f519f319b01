"""A model in a pipeline is the model on one device, and idle for as long as the formula says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.attention import AttentionConfig
from scanax.layers.gla import GLAConfig
from scanax.layers.mamba2 import Mamba2Config
from scanax.models import LM, LMConfig, by_layer, from_layers, split
from scanax.models.block import runs
from scanax.models.partition import shardings
from scanax.sharding import hlo, mesh, pipeline, schedule
from scanax.sharding.schedule import Schedule
from support.compare import close
from support.programs import program

B, T = 8, 16
BASE = LMConfig(
    vocab=32,
    width=16,
    depth=4,
    gla=GLAConfig(conv=4),
    mamba2=Mamba2Config(head_width=8, state=4),
    attention=AttentionConfig(heads=4, kv_heads=2, window=9),
    loss_chunk=40,
)
CASES = {  # pattern, mesh, schedule, whether a state goes on
    "gla": ("gla+swiglu", "pipe=4,data=2", Schedule(), True),
    "retention": ("retention", "pipe=4,data=2", Schedule(microbatches=4), False),
    "lightning": ("lightning+glu", "pipe=4,data=2", Schedule(), True),
    "mamba": ("mamba", "pipe=4,data=2", Schedule(), False),
    "mamba2": ("mamba2", "pipe=4,data=2", Schedule(), True),
    "aaren": ("aaren+gelu", "pipe=4,data=2", Schedule(), False),
    "attention": ("attention+swiglu", "pipe=4,data=2", Schedule(), False),
    "hybrid": (
        "mamba2,attention+swiglu",
        "pipe=2,seq=2,tensor=2",
        Schedule(microbatches=4, matmul="ring", attention="ring"),
        False,
    ),
    "rounds": ("gla", "pipe=2,seq=2,tensor=2", Schedule(rounds=2, microbatches=4), True),
    "rounds, fsdp": ("mamba", "pipe=2,fsdp=2,tensor=2", Schedule(rounds=2), False),
}


def data():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 32, (2, B, T)).astype(np.int32)
    reset = rng.random((B, T)) < 0.1
    reset[0, [7, 8]] = reset[1, 0] = True
    return tokens, targets, reset


def staged(config, over, how):
    return dataclasses.replace(config, pipeline=(over.shape["pipe"], how.rounds))


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_changes_nothing(case):
    pattern, text, how, streams = CASES[case]
    plain = dataclasses.replace(BASE, pattern=pattern)
    if "lightning" in pattern:  # the first block's rotation makes it unlike the others
        plain = dataclasses.replace(
            plain, lightning=dataclasses.replace(plain.lightning, lrpe_layers=0)
        )
    over = mesh.make(text)
    remat = {"rounds": "full", "hybrid": "dots"}.get(case, "none")
    config = dataclasses.replace(staged(plain, over, how), remat=remat)
    params, both, model = program(plain)
    carried = None
    if streams:
        _, carried = jax.jit(model)(jnp.asarray(data()[0][:, ::-1]), model.init_state(B, 1))
    (true, (true_nll, true_state)), true_grads = both(params, *data(), carried)
    drawn, both, _ = program(config)
    jax.tree.map(np.testing.assert_array_equal, by_layer(config, drawn), by_layer(plain, params))
    placed = jax.device_put(drawn, shardings(config, drawn, over))
    with jax.set_mesh(over), schedule.using(how):
        rows = mesh.sharding(over, mesh.ENDS, "seq")
        (value, (nll, state)), grads = both(placed, *jax.device_put(data(), rows), carried)
    close((value, nll), (true, true_nll), 1e-5)
    close(by_layer(config, grads), by_layer(plain, true_grads), 1e-4)
    assert len(state) == 4
    if streams:
        close(list(state), list(true_state), 1e-5)


def test_a_bfloat16_stream():
    """Its gradients lie as near to those of float32 as without a pipeline."""
    plain = dataclasses.replace(BASE, pattern="mamba2", dtype="bfloat16", residual_float32=False)
    over = mesh.make("pipe=2,tensor=2")
    config = dataclasses.replace(plain, pipeline=(2, 1))
    params, both, _ = program(plain)
    (coarse, _), coarse_grads = both(params, *data(), None)
    exact = dataclasses.replace(plain, dtype="float32")
    (_, _), true_grads = program(exact)[1](params, *data(), None)
    drawn, both, _ = program(config)
    placed = jax.device_put(drawn, shardings(config, drawn, over))
    with jax.set_mesh(over), schedule.using(Schedule(matmul="ring")):
        (value, _), grads = both(placed, *data(), None)
    close(value, coarse, 5e-3)

    def off(found, true):
        found, true = np.float64(found), np.float64(true)
        return abs(found - true).max() / abs(true).max()

    true_grads = by_layer(exact, true_grads)
    without = jax.tree.map(off, by_layer(plain, coarse_grads), true_grads)
    with_it = jax.tree.map(off, by_layer(config, grads), true_grads)
    coarse, found = (np.mean(jax.tree.leaves(each)) for each in (without, with_it))
    assert found < 1.25 * coarse < 0.05  # of numbers of 8 bits


@pytest.mark.parametrize(("stages", "rounds", "many"), [(4, 1, 4), (4, 1, 8), (4, 3, 8), (2, 4, 6)])
def test_every_part_runs_once_in_order_and_the_bubble_is_the_formula(stages, rounds, many):
    done: dict[tuple[int, int], int] = {}  # (microbatch, part) -> tick
    length = pipeline.ticks(stages, rounds, many)
    for tick in range(length):
        for stage in range(stages):
            number = tick - stage
            if 0 <= number < rounds * many:
                turn, microbatch = pipeline.item(number, stages, rounds)
                part = turn * stages + stage
                assert (microbatch, part) not in done
                if part:  # what it needs was finished by the stage before, one tick ago
                    assert done[microbatch, part - 1] == tick - 1
                done[microbatch, part] = tick
    assert len(done) == many * stages * rounds
    busy = rounds * many
    assert (length - busy) / busy == pytest.approx((stages - 1) / (rounds * many))


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_compiled_loop_has_the_ticks_and_sends_an_activation_in_each(rounds):
    how = Schedule(rounds=rounds, microbatches=8)
    over = mesh.make("pipe=4")
    config = staged(dataclasses.replace(BASE, depth=8, pattern="mamba"), over, how)
    _, params, rest = split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
    graphdef = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))[0]
    x = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward(params, rest, tokens):
        return nnx.merge(graphdef, params, rest).hidden(tokens)[0]

    with jax.set_mesh(over), schedule.using(how):
        counted = hlo.count(jax.jit(forward).lower(params, rest, x).compile().as_text())
    ticks = pipeline.ticks(4, rounds, 8)
    assert counted.calls["collective-permute"] == ticks
    assert counted.received["collective-permute"] == ticks * (B // 8) * T * BASE.width * 4


def test_a_checkpoints_names_do_not_know_of_stages():
    config = dataclasses.replace(BASE, depth=8, pattern="gla,mamba", pipeline=(2, 2))
    assert [run.layers for run in runs(config)] == [(0, 4, 2, 6), (1, 5, 3, 7)]
    _, params, _ = split(LM(config, rngs=nnx.Rngs(0)))
    again = from_layers(config, by_layer(config, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("pattern", "pipe", "says"),
    [
        ("gla", (3, 1), "depth=8 does not divide over pipe=3 parts; 6 or 9 would"),
        ("gla", (4, 4), "depth=8 does not divide over pipe=4 x rounds=4 parts; 16 would"),
        (
            "gla*3,mamba+gelu",
            (4, 1),
            r"parts of 2 blocks, which must be alike: block 3 \(mamba\+gelu\) is not like block 1 ",
        ),
        (
            "lightning+glu",
            (2, 1),
            r"block 4 \(lightning\+glu with mixer.theta missing\) is not like block 0 \(lightning",
        ),
    ],
)
def test_stages_that_are_not_alike_are_named(pattern, pipe, says):
    with pytest.raises(ValueError, match=says):
        runs(dataclasses.replace(BASE, depth=8, pattern=pattern, pipeline=pipe))


def test_microbatches_that_do_not_divide_are_said_at_once():
    over = mesh.make("pipe=4,data=2")
    config = dataclasses.replace(BASE, pipeline=(4, 1))
    params, both, _ = program(config)
    for many, says in (
        (6, "microbatches=6 does not divide over pipe=4 devices; 4 or 8 would"),
        (8, "rows=8 does not divide over data=2 x microbatches=8 parts; 16 would"),
    ):
        how = Schedule(microbatches=many)
        with jax.set_mesh(over), schedule.using(how), pytest.raises(ValueError, match=says):
            both.lower(params, *data(), None)
