"""The short convolution against its definition, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.conv import BLOCK, ShortConv
from support.compare import close

BATCH, CHANNELS, SIZE = 3, 5, 4


def definition(kernel, bias, x, window, reset):
    """Token after token: a list of the document's inputs so far, newest first."""
    outputs = []
    for b in range(x.shape[0]):
        past = [*window[b, ::-1]]
        for t in range(x.shape[1]):
            past = [
                x[b, t],
                *([jnp.zeros(CHANNELS, jnp.float32)] * (SIZE - 1) if reset[b, t] else past),
            ]
            outputs.append(bias + sum(kernel[SIZE - 1 - j] * past[j] for j in range(SIZE)))
    return jnp.stack(outputs).reshape(x.shape)


@pytest.mark.parametrize("time", [1, 2, 9])
def test_values_and_gradients_are_those_of_the_definition(time):
    conv = ShortConv(CHANNELS, SIZE, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(time)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, window, ct = (draw(BATCH, n, CHANNELS) for n in (time, SIZE - 1, time))
    reset = rng.random((BATCH, time)) < 0.3
    graph, params = nnx.split(conv)
    kernel, bias = params["kernel"][...], params["bias"][...]

    def ours(kernel, bias, x, window):
        model = nnx.merge(graph, {"kernel": kernel, "bias": bias})
        y, after = model(x, window, jnp.asarray(reset))
        return jnp.sum(y * ct), (y, after)

    def desired(*inputs):
        y = definition(*inputs, reset)
        return jnp.sum(y * ct), y

    inputs = kernel, bias, x, window
    (_, (y, after)), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3), has_aux=True))(
        *inputs
    )
    (_, expected), expected_grads = jax.value_and_grad(desired, (0, 1, 2, 3), has_aux=True)(*inputs)
    close(y, expected, 1e-6)
    # a window that no token of any row sees has no gradient to compare with
    close(grads[:3], expected_grads[:3], 1e-5)
    np.testing.assert_allclose(grads[3], expected_grads[3], atol=1e-6)
    last = np.concatenate([window, x], axis=1)[:, time:].copy()
    for b in range(BATCH):
        for t in np.flatnonzero(reset[b]):
            last[b, : max(0, SIZE - 1 - (time - t))] = 0
    np.testing.assert_array_equal(after, last)


def test_the_gradient_of_a_long_sequence_is_that_of_its_pieces():
    """The kernel's gradient is summed by blocks; the length is no multiple of one."""
    time = 2 * BLOCK + 37
    conv = ShortConv(CHANNELS, SIZE, bias=False, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 3)
    x, ct = (jax.random.normal(k, (BATCH, time, CHANNELS), jnp.float32) for k in keys[:2])
    reset = jax.random.bernoulli(keys[2], 0.05, (BATCH, time))
    graph, params = nnx.split(conv)
    grad = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x, None, reset)[0] * ct))(params)
    age = np.zeros((BATCH, time), int) + SIZE
    for t in range(time):
        age[:, t] = np.where(reset[:, t], 0, age[:, t - 1] + 1 if t else SIZE)
    rows = []
    for lag in range(SIZE - 1, -1, -1):
        shifted = np.pad(np.asarray(x, np.float64), [(0, 0), (lag, 0), (0, 0)])[:, :time]
        rows.append(np.sum(shifted * (age >= lag)[..., None] * np.asarray(ct), axis=(0, 1)))
    close(grad["kernel"][...], np.stack(rows), 1e-5)


def test_initial_values_are_uniform_within_a_root_of_the_size():
    conv = ShortConv(4000, SIZE, rngs=nnx.Rngs(0))
    for values in (conv.kernel[...], conv.bias[...]):
        assert jnp.abs(values).max() <= 0.5 and jnp.abs(values).max() > 0.49
        assert abs(jnp.std(values) - 0.5 / 3**0.5) < 0.01


def test_silu_follows_where_it_is_asked_for():
    x = jax.random.normal(jax.random.key(0), (BATCH, 7, CHANNELS), jnp.float32)
    plain, silu = (ShortConv(CHANNELS, SIZE, silu=each, rngs=nnx.Rngs(0)) for each in (False, True))
    (y, window), (activated, same) = plain(x), silu(x)
    close(activated, jax.nn.silu(y), 1e-6)
    np.testing.assert_array_equal(window, same)
