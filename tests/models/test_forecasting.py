"""A network over numbers reads them at once, by parts and one by one alike, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import AarenConfig, AttentionConfig, MoEConfig, RouterConfig
from scanax.models import SeriesConfig, SeriesModel, by_layer, decayed, from_layers, merge, split
from scanax.models.partition import shardings, state_shardings
from scanax.sharding import mesh
from support.compare import close

B, T, CUT = 2, 12, 5
BOTH = SeriesConfig(
    width=16,
    depth=2,
    pattern="aaren+gelu,attention+gelu",
    inputs=3,
    outputs=4,
    length=T,
    init_std=0.2,
)
POSITIONS = ("none", "sinusoidal", "learned")


@functools.cache
def parts(config):
    return split(SeriesModel(config, rngs=nnx.Rngs(0)))


@functools.cache
def program(config):
    graphdef, _, rest = parts(config)

    @jax.jit
    def call(params, x, state, reset):
        return merge(graphdef, params, rest)(x, state, reset)

    return call


def numbers(seed=0, rows=B, time=T):
    drawn = np.random.default_rng(seed).standard_normal((rows, time, 3))
    return jnp.asarray(drawn, jnp.float32)


@pytest.mark.parametrize("positions", POSITIONS[1:])
def test_streaming_is_the_whole_sequence(positions):
    """In two parts and then one by one: the same numbers, and a state that a loop can carry."""
    config = dataclasses.replace(BOTH, positions=positions)
    params, x, step = parts(config)[1], numbers(), program(config)
    whole, after = step(params, x, None, None)
    assert whole.shape == (B, T, 4) and whole.dtype == jnp.float32
    np.testing.assert_array_equal(after["position"], [T, T])
    state = merge(*parts(config)).init_state(B, T)
    shapes, pieces = jax.tree.map(jnp.shape, state), []
    for start, stop in ((0, CUT), (CUT, T - 2), (T - 2, T - 1), (T - 1, T)):
        y, state = step(params, x[:, start:stop], state, None)
        assert jax.tree.map(jnp.shape, state) == shapes
        pieces.append(y)
    close(jnp.concatenate(pieces, axis=1), whole, 1e-5)
    np.testing.assert_array_equal(state["position"], [T, T])
    close(state["blocks"][0], after["blocks"][0], 1e-5)  # attention that reads all keeps no cache


def test_what_is_before_a_reset_is_forgotten():
    config = dataclasses.replace(BOTH, positions="learned")
    params, x, step = parts(config)[1], numbers(), program(config)
    reset = np.zeros((B, T), bool)
    reset[0, CUT], reset[1, 0] = True, True
    packed, after = step(params, x, None, jnp.asarray(reset))
    # causal: what follows a document does not change it, so that one length serves all
    alone, _ = step(params, jnp.roll(x, -CUT, axis=1), None, None)
    whole, _ = step(params, x, None, None)
    close(packed[0, CUT:], alone[0, : T - CUT], 1e-5)
    close(packed[0, :CUT], whole[0, :CUT], 1e-5)
    close(packed[1], whole[1], 1e-5)
    np.testing.assert_array_equal(after["position"], [T - CUT, T])


def test_positions_are_heard():
    """Without them the order of what aaren has read is lost; with them it is not."""
    heard = dataclasses.replace(BOTH, pattern="aaren", depth=1, aaren=AarenConfig(init_std=0.5))
    x = numbers()
    turned = jnp.concatenate([x[:, CUT - 1 :: -1], x[:, CUT:]], axis=1)
    apart = {}
    for positions in POSITIONS:
        config = dataclasses.replace(heard, positions=positions)
        (one, _), (two, _) = (
            program(config)(parts(config)[1], given, None, None) for given in (x, turned)
        )
        apart[positions] = float(jnp.abs(one - two)[:, CUT:].max() / jnp.abs(one).max())
    assert apart["none"] < 1e-5 and apart["sinusoidal"] > 1e-3 and apart["learned"] > 1e-3


def test_aaren_and_attention_differ_by_one_vector_a_block():
    counts = {
        mixer: sum(x.size for x in jax.tree.leaves(parts(one(mixer))[1]))
        for mixer in ("aaren", "attention")
    }
    assert counts["aaren"] - counts["attention"] == 2 * 16


def one(mixer):
    return dataclasses.replace(BOTH, pattern=f"{mixer}+gelu")


def test_aarens_state_has_one_size_and_attentions_grows():
    def size(mixer, length):
        return sum(
            x.nbytes for x in jax.tree.leaves(merge(*parts(one(mixer))).init_state(1, length))
        )

    assert size("aaren", 8) == size("aaren", 1024)
    # keys and values of two blocks, float32
    assert size("attention", 1024) - size("attention", 512) == 512 * 2 * 2 * 16 * 4


def test_a_mesh_changes_nothing():
    """Values, the state and all gradients, with a state that goes on and documents that end."""
    config = dataclasses.replace(BOTH, pattern="aaren+gelu", positions="learned")
    graphdef, params, rest = parts(config)
    x, reset = numbers(rows=4, time=8), np.zeros((4, 8), bool)
    reset[1, 3] = reset[2, 4] = True
    _, state = program(config)(params, numbers(1, 4, 3), None, None)

    @jax.jit
    def loss(params, x, state, reset):
        y, state = merge(graphdef, params, rest)(x, state, reset)
        return (y**2).mean(), (y, state)

    both = jax.value_and_grad(loss, has_aux=True)
    expected = both(params, x, state, reset)
    made = mesh.make("data=2,seq=2,tensor=2")
    placed = jax.device_put(params, shardings(config, params, made))
    carried = jax.device_put(state, state_shardings(state, made))
    with jax.set_mesh(made):
        rows = mesh.sharding(made, mesh.ROWS, "seq")
        found = both(placed, jax.device_put(x, rows), carried, jax.device_put(reset, rows))
    close(found[0], expected[0], 1e-5)
    close(found[1], expected[1], 1e-4)


def test_a_position_that_was_not_learned_is_nan():
    config = dataclasses.replace(BOTH, positions="learned", pattern="aaren+gelu")
    y, _ = program(config)(parts(config)[1], numbers(time=T + 1), None, None)
    assert np.isnan(y[:, T]).all()


def test_checkpoints_know_no_runs_and_only_matrices_decay():
    config = dataclasses.replace(BOTH, positions="learned")
    params = parts(config)[1]
    flat = by_layer(config, params)
    assert {"input.kernel", "output.bias", "position", "layers.1.mixer.q.kernel"} <= flat.keys()
    jax.tree.map(np.testing.assert_array_equal, from_layers(config, flat, SeriesModel), params)
    decays = decayed(params)
    assert decays["input"]["kernel"] and not decays["position"] and not decays["output"]["bias"]


def test_bfloat16_says_float32_near_to_it():
    params = parts(BOTH)[1]
    expected, _ = program(BOTH)(params, numbers(), None, None)
    half = dataclasses.replace(BOTH, dtype="bfloat16")
    y, state = program(half)(params, numbers(), None, None)
    assert y.dtype == state["blocks"][0]["w"].dtype == jnp.float32
    close(y, expected, 0.03)


def test_float64_stays_so():
    with jax.enable_x64(True):
        double = dataclasses.replace(BOTH, dtype="float64", param_dtype="float64")
        x = jax.ShapeDtypeStruct((B, T, 3), jnp.float64)
        y, state = jax.eval_shape(lambda x: SeriesModel(double, rngs=nnx.Rngs(0))(x), x)
        kinds = {leaf.dtype for leaf in jax.tree.leaves((y, state["blocks"]))}
        assert kinds == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"inputs": 0}, "inputs=0; it must be at least 1"),
        ({"width": 15, "pattern": "mamba"}, "width=15 with sinusoidal positions; it must be even"),
        (
            {"pattern": "aaren+moe", "moe": MoEConfig(router=RouterConfig(kind="expert-choice"))},
            "lets a later token take an earlier one's expert",
        ),
        ({"attention": AttentionConfig(heads=0)}, "attention.heads=0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_said(given, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(BOTH, **given)
