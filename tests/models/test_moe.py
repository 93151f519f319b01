"""Mixtures of experts inside a model: on meshes, in decoding, with randomness, by every router."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import MoEConfig, RouterConfig
from scanax.layers.router import ROUTERS, losses
from scanax.models import LM, LMConfig, merge, rebalanced, split
from scanax.models.partition import shardings
from scanax.sharding import mesh, schedule
from scanax.sharding.schedule import PLAIN, Schedule
from support.compare import close

B, T = 8, 16
MODEL = LMConfig(
    vocab=48,
    width=16,
    depth=2,
    pattern="gla+moe",
    moe=MoEConfig(experts=4, hidden=24, shared=8, shared_gate=True),
    loss_chunk=40,
)
CHOICE = RouterConfig(kind="expert-choice")
CAUSAL = [kind for kind in ROUTERS if kind != "expert-choice"]


def using(kind, **more):
    moe = dataclasses.replace(MODEL.moe, router=RouterConfig(kind=kind), **more)
    return dataclasses.replace(MODEL, moe=moe)


def data():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 48, (2, B, T)).astype(np.int32)
    return tokens, targets, rng.random((B, T)) < 0.1


@functools.cache
def program(config, seed=0):
    """Parameters, and (loss with its routers', (nll, statistics)) with gradients."""
    graphdef, params, rest = split(LM(config, rngs=nnx.Rngs(seed)))

    def loss(params, tokens, targets, reset, key):
        key = None if key is None else jax.random.wrap_key_data(key)
        model = merge(graphdef, params, rest)
        nll, _, aux = model.nll(tokens, targets, reset=reset, key=key)
        added, figures = losses(config.moe.router, aux)
        return nll.mean() + added, (nll, aux, figures)

    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    ("over", "how"),
    [
        ("data=2,expert=2,tensor=2", PLAIN),
        ("expert=2,fsdp=2,seq=2", Schedule(expert_slices=2)),
        ("expert=8", Schedule(expert_degree=2)),
        ("seq=2,tensor=4", Schedule(matmul="ring", expert_degree=0)),
    ],
)
def test_a_mesh_changes_nothing(over, how):
    config = using("noisy") if over == "expert=8" else MODEL
    params, both = program(config)
    key = jax.random.key_data(jax.random.key(1))
    expected = both(params, *data(), key)
    made = mesh.make(over)
    placed = jax.device_put(params, shardings(config, params, made))
    with jax.set_mesh(made), schedule.using(how):
        rows = mesh.sharding(made, mesh.ROWS, "seq")
        (value, aux), grads = both(placed, *jax.device_put(data(), rows), key)
    (true, true_aux), true_grads = expected
    close((value, aux), (true, true_aux), 1e-5)
    close(grads, true_grads, 1e-4)


def test_a_pipeline_of_experts_changes_nothing():
    """Statistics are means over microbatches, so that the loss of the load is the whole batch's."""
    params, both = program(MODEL)
    (true, true_aux), _ = both(params, *data(), None)
    staged = dataclasses.replace(MODEL, pipeline=(2, 1))
    placed, both = program(staged)
    made = mesh.make("pipe=2,expert=2,tensor=2")
    placed = jax.device_put(placed, shardings(staged, placed, made))
    with jax.set_mesh(made):
        rows = mesh.sharding(made, mesh.ENDS, "seq")
        (value, aux), grads = both(placed, *jax.device_put(data(), rows), None)
    close((value, aux), (true, true_aux), 1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_router_learns_and_decodes(kind):
    config = dataclasses.replace(using(kind), depth=1)
    params, both = program(config)
    (_, (nll, aux, figures)), grads = both(params, *data(), None)
    assert aux["moe_load"].shape == (1, 4) and figures["moe_dropped"] == 0
    close(aux["moe_load"].sum(), 1.0, 1e-6)
    router = grads["blocks"][0]["mlp"]["router"]
    for name, grad in router.items():
        silent = name == "bias" or name == "noise"  # the noise is drawn with a key only
        assert np.isfinite(grad).all() and (np.abs(grad).max() > 0) != silent, name
    # prefill, then a token at a time
    graphdef, _, rest = split(LM(config, rngs=nnx.Rngs(0)))
    call = jax.jit(lambda *a: merge(graphdef, params, rest)(*a))
    tokens, targets, reset = (jnp.asarray(a) for a in data())
    logits, _ = call(tokens, None, reset)
    expected = -jax.nn.log_softmax(logits)[np.arange(B)[:, None], np.arange(T), targets]
    close(nll, expected, 1e-5)
    state = merge(graphdef, params, rest).init_state(B, T)
    first, state = call(tokens[:, :13], state, reset[:, :13])
    parts = [first]
    for t in range(13, T):
        one, state = call(tokens[:, t : t + 1], state, reset[:, t : t + 1])
        parts.append(one)
    close(jnp.concatenate(parts, axis=1), logits, 1e-5)


@pytest.mark.parametrize("kind", ["noisy", "switch", "gshard"])
def test_a_key_decides_what_is_random(kind):
    params, both = program(using(kind))
    one, two = (jax.random.key_data(jax.random.key(seed)) for seed in (1, 2))
    grads = [both(params, *data(), key)[1]["embedding"] for key in (None, one, one, two)]
    assert np.array_equal(grads[1], grads[2])
    assert len({np.asarray(grad).tobytes() for grad in grads}) == 3


def test_layers_draw_differently():
    """Two blocks of the same parameters and tokens."""
    params, both = program(using("noisy"))
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params["blocks"][0])
    still = {"mixer": jax.tree.map(jnp.zeros_like, same["mixer"])}
    for name in ("down", "shared"):
        still[name] = jax.tree.map(jnp.zeros_like, same["mlp"][name])
    mlp = same["mlp"] | {name: still[name] for name in ("down", "shared")}
    params = params | {"blocks": {0: same | {"mixer": still["mixer"], "mlp": mlp}}}
    key = jax.random.key_data(jax.random.key(1))
    for given, alike in ((None, True), (key, False)):
        load = both(params, *data(), given)[0][1][1]["moe_load"]
        assert np.array_equal(load[0], load[1]) == alike


@pytest.mark.parametrize("priority", ["order", "score"])
def test_only_training_drops(priority):
    params, both = program(using("softmax", capacity=0.5, priority=priority))
    key = jax.random.key_data(jax.random.key(1))
    dropped = [both(params, *data(), given)[0][1][2]["moe_dropped"] for given in (None, key)]
    assert dropped[0] == 0 and 0.3 < dropped[1] < 0.7


def test_a_bias_moves_against_the_load():
    config = using("sigmoid")
    params, _ = program(config)
    load = jnp.array([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], jnp.float32)
    after = rebalanced(config, params, load)
    biases = after["blocks"][0]["mlp"]["router"]["bias"]
    np.testing.assert_allclose(biases, [[-1e-3, 1e-3, 1e-3, 1e-3], [0, 0, 0, 0]], atol=1e-9)
    same = rebalanced(MODEL, params, load)
    assert same is params
    # and no loss stands beside it, unless it is asked for
    aux = {"moe_load": load, "moe_probability": load}
    aux |= {name: jnp.zeros(2, jnp.float32) for name in ("moe_z", "moe_dropped", "moe_entropy")}
    assert losses(config.moe.router, aux)[0] == 0
    assert losses(RouterConfig(kind="sigmoid", balance=0.1), aux)[0] > 0.1


def test_experts_that_choose_are_for_no_language_model():
    with pytest.raises(ValueError, match="expert-choice lets a later token"):
        using("expert-choice")
    dense = dataclasses.replace(MODEL, pattern="gla+swiglu")
    dataclasses.replace(dense, moe=MoEConfig(router=RouterConfig(kind="expert-choice")))


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (RouterConfig, {"kind": "switch", "top": 2}, "top=2; router switch chooses 1"),
        (RouterConfig, {"kind": "noisy", "pooled": True}, "pooled=True is for router softmax or"),
        (RouterConfig, {"top": 0}, "top=0; it must be at least 1"),
        (Schedule, {"expert_degree": 0, "expert_slices": 2}, "expert_slices=2 is for tokens"),
        (Schedule, {"expert_ladder": (float("inf"),)}, "expert_ladder=.*must be finite"),
        (RouterConfig, {"scale": 2.0}, "scale=2.0 is for router sigmoid"),
        (RouterConfig, {"kind": "noisy", "jitter": 0.1}, "jitter=0.1 is for router switch"),
        (RouterConfig, {"kind": "cosine", "temperature": 0.0}, "temperature=0.0; it must be more"),
        (RouterConfig, {"kind": "soft"}, "kind='soft' is not one of softmax, gshard, "),
        (RouterConfig, {"kind": "switch", "jitter": 1.0}, "jitter=1.0; it must be 0 or more"),
        (RouterConfig, {"kind": "sigmoid", "bias_rate": -1.0}, "bias_rate=-1.0; it must be 0"),
        (RouterConfig, {"balance": -0.1}, "balance=-0.1; it must be 0 or more"),
        (RouterConfig, {"z": -1.0}, "z=-1.0; it must be 0 or more"),
        (RouterConfig, {"init_std": -1.0}, "init_std=-1.0; it must be 0 or more"),
        (MoEConfig, {"activation": "silu"}, "activation='silu' is not one of swiglu, gelu, relu"),
        (MoEConfig, {"capacity": 1.0, "priority": "scores"}, "priority='scores' is not one of"),
        (MoEConfig, {"router": CHOICE, "experts": 1}, "router.top=2 of experts=1"),
        (MoEConfig, {"router": CHOICE, "capacity": 1.0}, "capacity=1.0: expert-choice has"),
        (MoEConfig, {"experts": 1}, "router.top=2 of experts=1"),
        (MoEConfig, {"capacity": -1.0}, "capacity=-1.0; it must be 0"),
        (MoEConfig, {"shared_gate": True}, "shared_gate is for a shared expert"),
        (MoEConfig, {"priority": "score"}, "priority=score is for a capacity"),
    ],
)
def test_options_that_would_be_ignored_are_refused(unchecked, config, options, says):
    with pytest.raises(ValueError, match=says):
        config(**options)
