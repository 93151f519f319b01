"""ConvLSTM: its equations frame by frame in float64, any cut of a stream, documents apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.convlstm import ConvLSTM, ConvLSTMConfig
from scanax.sharding import mesh
from support.compare import close

BATCH, TIME, HEIGHT, WIDTH, D = 2, 6, 4, 5, 6


@functools.cache
def case(dtype=jnp.float32):
    """(call(x, state, reset), the layer, frames, resets within a row and at its start)."""
    config = ConvLSTMConfig(image=(HEIGHT, WIDTH), hidden=5)
    layer = ConvLSTM(D, config, dtype=dtype, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    call = jax.jit(lambda x, state, reset: nnx.merge(graph, params)(x, state, reset))
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, HEIGHT, WIDTH, D), dtype)
    reset = np.zeros((BATCH, TIME), bool)
    reset[0, 3] = reset[1, 0] = True
    return call, layer, x, jnp.asarray(reset)


def convolved(x, kernel):
    around = kernel.shape[0] // 2
    padded = np.pad(x, [(0, 0), (around, around), (around, around), (0, 0)])
    (height, width), size = x.shape[1:3], kernel.shape[0]
    taps = [(j, k) for j in range(size) for k in range(size)]
    return sum(padded[:, j : j + height, k : k + width] @ kernel[j, k] for j, k in taps)


def equations(layer, x, reset):
    """The layer's docstring, a frame at a time."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(layer)))
    h = c = np.zeros((BATCH, HEIGHT, WIDTH, 5))
    found = []
    for t in range(TIME):
        keep = ~np.asarray(reset)[:, t, None, None, None]
        h, c = h * keep, c * keep
        gates = convolved(x[:, t], w["x"]["kernel"]) + convolved(h, w["h"]["kernel"])
        i, f, o, g = np.split(gates + w["x"]["bias"], 4, axis=-1)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        y = x[:, t] + convolved(h, w["out"]["kernel"]) + w["out"]["bias"]
        y = y - y.mean(-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
        found.append(y * w["norm"]["scale"] + w["norm"]["bias"])
    return np.stack(found, 1), {"h": h, "c": c}


def test_it_is_its_equations():
    call, layer, x, reset = case()
    y, state = equations(layer, np.asarray(x, np.float64), reset)
    close(call(x, None, reset), (y, state), 1e-5)
    assert (layer.x.bias[...][5:10] == 1).all()  # of f


def test_any_cut_of_a_stream_is_the_whole():
    call, layer, x, reset = case()
    full, final = call(x, None, reset)
    state, found = layer.init_state(BATCH, TIME, jnp.float32), []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        y, state = call(x[:, start:stop], state, reset[:, start:stop])
        found.append(y)
    close((jnp.concatenate(found, 1), state), (full, final), 1e-6)


def test_a_frame_that_is_not_finite_ends_with_its_document():
    call, _, x, reset = case()
    bad, _ = call(x.at[0, 1].set(jnp.nan), None, reset)
    good, _ = call(x, None, reset)
    assert jnp.isnan(bad[0, 1:3]).any((1, 2, 3)).all()
    close((bad[0, 3:], bad[1]), (good[0, 3:], good[1]), 1e-6)


def test_bfloat16_keeps_a_float32_state():
    call, _, x, reset = case(jnp.bfloat16)
    y, state = call(x, None, reset)
    assert y.dtype == jnp.bfloat16 and {s.dtype for s in state.values()} == {jnp.dtype(jnp.float32)}
    close(y.astype(jnp.float32), case()[0](x.astype(jnp.float32), None, reset)[0], 0.03)


def test_rows_divide_over_devices_and_time_does_not(unchecked):
    _, layer, x, reset = case()
    graph, params = nnx.split(layer)

    def loss(params, x):
        y, state = nnx.merge(graph, params)(x, None, reset)
        return (y**3).sum() + (state["c"] ** 2).sum()

    alone = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    with jax.set_mesh(mesh.make("data=2,tensor=2")):
        close(jax.jit(jax.grad(loss, (0, 1)))(params, x), alone, 1e-5)
    says = "seq=2: ConvLSTM is not linear in its state, so its time does not divide over devices"
    with jax.set_mesh(mesh.make("seq=2")), pytest.raises(ValueError, match=says):
        jax.eval_shape(loss, params, x)
