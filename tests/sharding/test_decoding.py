"""Attention over a cache on several devices is that on one; only queries and results travel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax import kernels
from scanax.kernels.attention import cache
from scanax.layers.attention import Attention, AttentionConfig
from scanax.sharding import decoding, hlo, mesh, ops
from support.compare import close

B, H, K, V = 2, 4, 8, 6
MESHES = ("seq=8", "data=2,seq=2,tensor=2", "tensor=4,seq=2", "data=2,tensor=4")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(time, keys, groups):
    """Keys in any order, some slots empty; queries, one that sees nothing, one that sees many."""
    rng = np.random.default_rng(time)
    index = np.stack([rng.permutation(keys) for _ in range(B)]).astype(np.int32)
    index[rng.random(index.shape) < 0.3] = -1
    last = rng.integers(0, keys, (B, time)).astype(np.int32)
    first = (last * rng.random((B, time))).astype(np.int32)
    last[:, -1], first[:, -1] = (5, keys - 5), (9, 3)
    arrays = normal(1, B, time, H, K), normal(2, B, keys, groups, K), normal(3, B, keys, groups, V)
    return arrays, {"q_index": last, "q_start": first, "kv_index": index}


def both(op, ct, **how):
    def loss(arrays, index):
        y = op(*arrays, **index, **how)
        return (y * ct).sum(), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("over", MESHES)
@pytest.mark.parametrize(("time", "groups", "window"), [(1, 4, None), (8, 2, 9), (8, 1, None)])
def test_the_op_is_that_of_one_device(over, time, groups, window):
    arrays, index = draw(time, 24, groups)
    ct = normal(4, B, time, H, V)
    (_, true), true_grads = both(kernels.attention, ct, window=window)(arrays, index)
    with jax.set_mesh(mesh.make(over)):
        (_, y), grads = both(ops.attention, ct, window=window)(arrays, index)
    assert not np.any(true[0, -1])
    close(y, true, 1e-5)
    close(grads, true_grads, 1e-4)


def test_what_is_not_finite_is_seen_where_it_is_on_one_device():
    (q, k, v), index = draw(8, 24, 2)
    index["q_start"][:] = 0
    v[0, 7, 0, 0], k[1, 3, 1, 2] = np.inf, np.nan
    true = jax.jit(kernels.attention)(q, k, v, **index)
    with jax.set_mesh(mesh.make("seq=4,tensor=2")):
        y = jax.jit(ops.attention)(q, k, v, **index)
    assert 0 < np.isnan(true).sum() < true.size
    np.testing.assert_array_equal(np.isnan(y), np.isnan(true))


def test_a_single_key_is_on_every_device():
    x = normal(1, B, 1, H, K)
    with jax.set_mesh(mesh.make("seq=4,data=2")):
        close(jax.jit(ops.attention)(x, x, x), x, 1e-6)


WIDTH, SIZE = 16, 12
OPTIONS = {
    "whole": {},
    "window": {"window": 6},
    "grouped": {"kv_heads": 2, "window": 5},
    "one group": {"kv_heads": 1},
}


def built(**options):
    model = Attention(WIDTH, AttentionConfig(heads=H, init_std=0.3, **options), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    return model, params, lambda params, x, state, r: nnx.merge(graph, params)(x, state, r)


def stream(model, params, step):
    """A call of 8 tokens, one of 8 more, two of one token each: unequal prompts, and a reset."""
    x = normal(5, B, 18, WIDTH)
    reset = np.zeros((B, 18), bool)
    reset[0, 3] = reset[1, 9] = reset[0, 17] = True
    state, outputs = model.init_state(B, SIZE, jnp.float32), []
    for begin, end in ((0, 8), (8, 16), (16, 17), (17, 18)):
        y, state = step(params, x[:, begin:end], state, reset[:, begin:end])
        outputs.append(y)
    return jnp.concatenate(outputs, 1), state


@pytest.mark.parametrize("over", ("seq=4", "data=2,seq=2,tensor=2", "tensor=4"))
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_over_devices_is_that_of_one(name, over):
    model, params, call = built(**OPTIONS[name])
    true, true_state = stream(model, params, jax.jit(call))
    with jax.set_mesh(mesh.make(over)):
        y, state = stream(model, params, jax.jit(call))
    lost = np.isnan(true)  # row 0's document outgrows its cache, where there is no window
    if "window" not in OPTIONS[name]:
        assert lost.any() and not lost.all()
    np.testing.assert_array_equal(np.isnan(y), lost)
    close(np.where(lost, 0, y), np.where(lost, 0, true), 1e-5)
    close(cache.resized(state, true_state["k"].shape[2]), true_state, 1e-5)


@pytest.mark.parametrize("time", [1, 8])
def test_gradients_go_through_the_cache(time):
    model, params, call = built(kv_heads=2, window=6)
    x, ct = normal(5, 2, B, 8, WIDTH), normal(6, B, time, WIDTH)
    reset = jnp.zeros((B, 8), bool).at[0, 5].set(True)

    @jax.jit
    @jax.grad
    def gradients(inputs):
        params, x = inputs
        _, state = call(params, x[0], model.init_state(B, 6, jnp.float32), reset)
        y, state = call(params, x[1, :, :time], state, jnp.zeros((B, time), bool))
        return (y * ct).sum() + jnp.sin(state["k"]).sum()

    true = gradients((params, x))
    for over in ("seq=2", "data=2,seq=2,tensor=2"):
        with jax.set_mesh(mesh.make(over)):
            close(gradients((params, x)), true, 1e-4)


def test_a_ring_is_resized():
    """After so many tokens, what a ring of the other size would hold, as far as it is there."""
    x, length = jnp.asarray(normal(1, 2, 20, 1, 1)), jnp.zeros(2, jnp.int32)

    def ring(size, time):
        empty = cache.empty(2, size, 1, 1, jnp.float32)
        kept = cache.write(empty["k"], x[:, :time], length)
        return empty | {"k": kept, "v": kept, "length": length + time}

    for time in (3, 7, 20):
        for old, new in ((5, 8), (8, 5)):
            moved = cache.resized(ring(old, time), new)["k"][:, 0, :, 0]
            whole = np.asarray(ring(new, time)["k"][:, 0, :, 0])
            gone = x[0, : max(0, time - old), 0, 0]  # before a larger ring
            np.testing.assert_array_equal(moved, np.where(np.isin(whole[:1], gone), 0, whole))


DEVICES, BYTES = 8, 4


@pytest.mark.parametrize("size", [64, 1024])
def test_what_a_token_exchanges_is_one_partial_result_a_device(size):
    """P - 1 results of V numbers and a log-sum-exp for each row and head, whatever the cache."""
    state = {name: jnp.zeros((B, 2, size, K), jnp.float32) for name in ("k", "v")}
    state["length"] = jnp.zeros(B, jnp.int32)
    q, k = jnp.zeros((B, 1, H, K), jnp.float32), jnp.zeros((B, 1, 2, K), jnp.float32)
    made = mesh.make(f"seq={DEVICES}")
    for name in ("k", "v"):
        state[name] = jax.device_put(state[name], mesh.sharding(made, None, None, "seq"))
    with jax.set_mesh(made):
        step = jax.jit(decoding.over_cache, donate_argnums=3)
        compiled = step.lower(q, k, k, state, jnp.zeros((B, 1), jnp.int32)).compile()
    counted = hlo.count(compiled.as_text())
    assert counted.received == {"all-gather": (DEVICES - 1) * BYTES * B * H * (K + 1)}
    assert counted.calls == {"all-gather": 1}


def test_several_tokens_exchange_no_cache():
    """Queries, new keys and values to all; results back to the queries' owners."""
    received = []
    for size in (64, 1024):
        state = {name: jnp.zeros((B, 2, size, K), jnp.float32) for name in ("k", "v")}
        state["length"] = jnp.zeros(B, jnp.int32)
        q, k = jnp.zeros((B, 16, H, K), jnp.float32), jnp.zeros((B, 16, 2, K), jnp.float32)
        made = mesh.make(f"seq={DEVICES}")
        for name in ("k", "v"):
            state[name] = jax.device_put(state[name], mesh.sharding(made, None, None, "seq"))
        with jax.set_mesh(made):
            step = jax.jit(decoding.over_cache)
            compiled = step.lower(q, k, k, state, jnp.zeros((B, 16), jnp.int32)).compile()
        received.append(dict(hlo.count(compiled.as_text()).received))
    span, others = 16 // DEVICES, DEVICES - 1
    tokens = others * B * span * BYTES
    assert (
        received[0]
        == received[1]
        == {
            "all-gather": tokens * (H * K + 2 * 2 * K + 1),  # and where each document starts
            "all-to-all": tokens * H * (K + 1),
        }
    )


def test_what_does_not_divide_is_said():
    q, state = jnp.zeros((B, 1, H, K)), cache.empty(B, 6, H, K, jnp.float32)
    with jax.set_mesh(mesh.make("seq=4")):
        with pytest.raises(ValueError, match="cache=6 does not divide over seq=4 devices; 4 or 8"):
            decoding.over_cache(q, q, q, state, jnp.zeros((B, 1), jnp.int32))
        with pytest.raises(ValueError, match="keys=6 does not divide over seq=4 devices; 4 or 8"):
            ops.attention(q, *[jnp.zeros((B, 6, H, K))] * 2, q_index=jnp.zeros((B, 1), jnp.int32))
        with pytest.raises(ValueError, match="reset goes with as many queries as keys"):
            x, four = jnp.zeros((B, 8, H, K)), jnp.zeros((B, 4), bool)
            ops.attention(x[:, :4], x, x, q_index=jnp.zeros((B, 4), jnp.int32), reset=four)
