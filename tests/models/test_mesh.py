"""A language model on a mesh is the model on one device: loss, state and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.aaren import AarenConfig
from scanax.layers.attention import AttentionConfig
from scanax.layers.gla import GLAConfig
from scanax.layers.lightning import LightningConfig
from scanax.layers.mamba import MambaConfig
from scanax.layers.mamba2 import Mamba2Config
from scanax.layers.mlp import MLPConfig
from scanax.layers.moe import MoEConfig
from scanax.layers.retention import RetentionConfig
from scanax.layers.router import ROUTERS, RouterConfig
from scanax.models import LM, LMConfig, ResidualConfig, merge, split
from scanax.models.partition import shardings, specs, state_shardings
from scanax.sharding import mesh, schedule
from scanax.sharding.schedule import PLAIN, Schedule
from support.compare import close
from support.programs import program

B, T = 8, 64
ALL = LMConfig(
    vocab=48,
    width=32,
    depth=8,
    pattern="gla+swiglu*2,retention+gelu,lightning+glu,mamba,mamba2,aaren,attention+geglu",
    gla=GLAConfig(conv=4),
    retention=RetentionConfig(conv=3),
    mamba2=Mamba2Config(head_width=8, state=4),
    attention=AttentionConfig(heads=4, kv_heads=2),
    loss_chunk=40,
)
UNTIED = dataclasses.replace(ALL, depth=3, pattern="mamba*2,attention+swiglu", tie_head=False)
NORMED = dataclasses.replace(
    ALL,
    depth=3,
    pattern="lightning+glu,conv,attention+swiglu",
    residual=ResidualConfig(normed=True, linear=(1.2, 0.9), attention=(1.3, 0.7), mlp=(1.1, 0.8)),
)
STATES = dataclasses.replace(ALL, depth=5, pattern="gla,mamba2+gelu,lightning+glu,aaren,conv")
CASES = {
    "all over time": (ALL, "seq=8", PLAIN),
    "all over three": (ALL, "data=2,seq=2,tensor=2", Schedule(states="scan")),
    "collective matmul": (ALL, "fsdp=2,seq=2,tensor=2", Schedule(matmul="ring")),
    "a normed stream": (NORMED, "fsdp=2,seq=2,tensor=2", Schedule(matmul="ring")),
    "rows": (UNTIED, "data=8", PLAIN),
    "fsdp": (ALL, "fsdp=8", PLAIN),
    "heads and time": (ALL, "tensor=4,seq=2", Schedule(attention="token-ring")),
    "a state that goes on": (STATES, "data=2,seq=4", Schedule(states="ring")),
}


def data():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 48, (2, B, T)).astype(np.int32)
    reset = rng.random((B, T)) < 0.05
    reset[0, [8, 31, 32]] = reset[1, 0] = True
    return tokens, targets, reset


@functools.cache
def on_one(config):
    """The state that goes in, and what comes of it on one device."""
    params, both, model = program(config)
    carried = None
    if config is STATES:
        _, carried = jax.jit(model)(jnp.asarray(data()[0][:, ::-1]), model.init_state(B, 1))
    return carried, both(params, *data(), carried)


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_nothing(case):
    config, over, how = CASES[case]
    params, both, _ = program(config)
    carried, expected = on_one(config)
    made = mesh.make(over)
    placed = jax.device_put(params, shardings(config, params, made))
    with jax.set_mesh(made), schedule.using(how):
        rows = mesh.sharding(made, mesh.ROWS, "seq")
        (value, (nll, state)), grads = both(placed, *jax.device_put(data(), rows), carried)
    (true, (true_nll, true_state)), true_grads = expected
    close((value, nll), (true, true_nll), 1e-5)
    close([s for s in state if s], [s for s in true_state if s], 1e-5)
    close(grads, true_grads, 1e-4)


def test_every_parameter_has_its_place():
    params, _, _ = program(ALL)
    tree = specs(ALL, params)
    places = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jax.P))
    named = {axis for spec in places for axis in spec}
    assert named == {None, "fsdp", "tensor", "pipe", ("tensor", "fsdp")}
    with pytest.raises(ValueError, match=r"no rule says where the parameter gla.other lies"):
        specs(ALL, {"blocks": {0: {"mixer": {"other": jnp.zeros(3, jnp.float32)}}}})
    with pytest.raises(ValueError, match=r": 16 does not divide over tensor=3 devices; 15 or 18"):
        shardings(ALL, params, mesh.make("tensor=3"))


def test_every_state_has_its_place():
    """Heads or channels over tensor, slots over seq; two key heads do not divide over four."""
    state = jax.eval_shape(lambda: LM(ALL, rngs=nnx.Rngs(0)).init_state(B, 16))
    places = state_shardings(state, mesh.make("data=2,tensor=4"))
    kinds = ("gla", "gla", "retention", "lightning", "mamba", "mamba2", "aaren", "attention")
    named = {}
    for kind, entry in zip(kinds, places, strict=True):
        named[kind] = {name: place.spec[1:] for name, place in entry.items()}
    heads, channels = ("tensor",), (None, "tensor")
    windows = {f"conv_{n}": channels for n in "qkv"}
    assert named["gla"] == {"S": heads} | windows
    assert named["mamba2"]["B_conv"] == named["mamba"]["conv"] == channels
    assert named["aaren"] == {"m": heads, "u": heads, "w": heads}
    assert named["attention"]["k"] == named["attention"]["v"] == (None, "seq")
    assert named["retention"] == {"S": heads, "position": ()} | windows
    (own,) = state_shardings(((state[0]["S"], {"other": state[0]["S"]}),), mesh.make())
    assert [place.spec for place in jax.tree.leaves(own)] == 2 * [jax.P(mesh.ROWS)]


def test_every_option_has_its_place():
    """Biases, norms with weights, grouped heads: whatever a flag adds is laid out."""
    biased = dataclasses.replace(
        ALL,
        norm="layer",
        tie_head=False,
        mlp=MLPConfig(bias=True),
        mamba=MambaConfig(bias=True, norm="weighted"),
        mamba2=Mamba2Config(head_width=8, state=4, bias=True),
        aaren=AarenConfig(bias=True),
        attention=AttentionConfig(heads=4, bias=True, out_bias=True),
        lightning=LightningConfig(norm_scale=True),
    )
    every = [biased, dataclasses.replace(ALL, mamba=MambaConfig(selective=False))]
    for kind in ROUTERS.keys() - {"expert-choice"}:
        moe = MoEConfig(router=RouterConfig(kind=kind), shared=8, shared_gate=True)
        every.append(dataclasses.replace(biased, depth=1, pattern="gla+moe", moe=moe))
    for config in every:
        _, params, _ = split(nnx.eval_shape(lambda config=config: LM(config, rngs=nnx.Rngs(0))))
        tree = specs(config, params)
        assert jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, jax.P))


def test_one_token_decodes_over_rows_and_heads():
    config = dataclasses.replace(STATES, pattern="gla,mamba2,mamba", depth=3)
    graphdef, params, rest = split(LM(config, rngs=nnx.Rngs(0)))
    step = jax.jit(lambda params, tokens, state: merge(graphdef, params, rest)(tokens, state))
    state = merge(graphdef, params, rest).init_state(B, 1)
    token = jnp.ones((B, 1), jnp.int32)
    alone = step(params, token, step(params, token, state)[1])[0]
    made = mesh.make("data=2,tensor=4")
    placed = jax.device_put(params, shardings(config, params, made))
    with jax.set_mesh(made):
        spread = step(placed, token, step(placed, token, state)[1])[0]
    close(spread, alone, 1e-5)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ("data=3", "rows=8 does not divide over data=3 devices; 6 or 9 would"),
        ("seq=5", "length=64 does not divide over seq=5 devices; 60 or 65 would"),
        ("tensor=5", "vocabulary=48 does not divide over tensor=5 devices; 45 or 50 would"),
    ],
)
def test_what_does_not_divide_is_said_at_once(over, says):
    params, both, _ = program(UNTIED)
    with jax.set_mesh(mesh.make(over)), pytest.raises(ValueError, match=says):
        both.lower(params, *data(), None)
