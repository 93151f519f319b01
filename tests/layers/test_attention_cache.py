"""Attention's window against its definition, and what its cache holds and loses."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.kernels.attention import decode_xla
from scanax.layers.attention import Attention, AttentionConfig
from support.compare import close

WIDTH, BATCH, TIME = 8, 2, 12


def build(**options):
    model = Attention(WIDTH, AttentionConfig(heads=2, **options), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    step = jax.jit(lambda x, state, reset: nnx.merge(graph, params)(x, state, reset))
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH), jnp.float32)
    return model, step, x, jnp.zeros((BATCH, TIME), bool)


def decode(step, x, state, reset):
    outputs = []
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state, reset[:, t : t + 1])
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def definition(model, x, window):
    """Every pair of tokens, the rotation written as a complex factor."""
    x = np.asarray(x, np.float64)
    roles = (np.asarray(m.kernel[...], np.float64) for m in (model.q, model.k, model.v))
    q, k, v = (np.reshape(x @ w, (*x.shape[:2], 2, -1)) for w in roles)
    half = q.shape[-1] // 2
    angle = np.arange(TIME)[:, None, None] * 100.0 ** (-np.arange(half) / half)

    def turn(a):
        return (a[..., :half] + 1j * a[..., half:]) * np.exp(1j * angle)

    scores = np.einsum("bthk,bshk->bhts", turn(q), turn(k).conj()).real / (2 * half) ** 0.5
    apart = np.arange(TIME)[:, None] - np.arange(TIME)
    weights = np.where((apart >= 0) & (apart < window), np.exp(scores), 0)
    y = np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), v)
    return y.reshape(*x.shape[:2], -1) @ np.asarray(model.out.kernel[...], np.float64)


@pytest.mark.parametrize("window", [1, 3, TIME])
def test_a_window_sees_its_last_tokens(window):
    model, step, x, none = build(window=window, rope_base=100.0)
    y, _ = step(x, None, none)
    close(y, definition(model, x, window), 1e-5)


def test_a_ring_holds_one_window_and_loses_nothing_that_is_seen():
    model, step, x, none = build(window=3)
    state = model.init_state(BATCH, 1000, jnp.float32)
    assert state["k"].shape == state["v"].shape == (BATCH, 2, 3, 4)
    full, _ = step(x, None, none)
    y, state = decode(step, x, state, none)
    close(y, full, 1e-5)
    np.testing.assert_array_equal(state["length"], TIME)


@pytest.mark.parametrize("options", [{}, {"window": 10}])
def test_a_document_longer_than_the_cache_reads_nan_from_there_on(options):
    """Not the oldest tokens silently left out; a reset makes room again."""
    model, step, x, none = build(**options)
    state = model.init_state(BATCH, 8, jnp.float32)
    y, _ = decode(step, x, state, none)
    full, _ = step(x, None, none)
    close(y[:, :8], full[:, :8], 1e-5)
    assert jnp.isnan(y[:, 8:]).all()
    reset = none.at[0, 6].set(True)
    y, _ = decode(step, x, state, reset)
    full, _ = step(x, None, reset)
    close(y[0], full[0], 1e-5)
    assert jnp.isnan(y[1, 8:]).all()
    _, state = step(x[:, :6], state, none[:, :6])  # the same in chunks, of which the first fits
    y, _ = step(x[:, 6:], state, reset[:, 6:])
    close(y[0], full[0, 6:], 1e-5)
    y, _ = step(x[:, 6:], step(x[:, :6], state, none[:, :6])[1], none[:, 6:])
    assert jnp.isnan(y[:, 0]).all()


def test_rows_of_different_streams_can_be_batched():
    """A state is cut and joined along its batch axis, whatever the rows' lengths."""
    model, step, x, none = build()
    empty = model.init_state(BATCH, TIME, jnp.float32)
    _, short = step(x[:, :3], empty, none[:, :3])
    full, long = step(x[:, :6], empty, none[:, :6])
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), short, long)
    token = jnp.stack([x[0, 3:4], x[1, 6:7]])
    y, _ = step(token, mixed, none[:, :1])
    close(y[0], full[0, 3:4], 1e-5)
    full, _ = step(x, None, none)
    close(y[1], full[1, 6:7], 1e-5)


def test_tokens_are_decoded_without_copies_of_a_ring_of_one_block():
    model, _, _, none = build()
    graph, params = nnx.split(model)
    state = model.init_state(1, decode_xla.BLOCK // 2, jnp.float32)

    @partial(jax.jit, donate_argnums=1)
    def decode(x, state):
        def step(_, carry):
            return nnx.merge(graph, params)(*carry, none[:1, :1])

        return jax.lax.fori_loop(0, 3, step, (x, state))

    program = decode.lower(jnp.ones((1, 1, WIDTH), jnp.float32), state).compile().as_text()
    ring = rf"= f32\[{','.join(map(str, state['k'].shape))}\]\S* "
    assert re.search(ring, program)
    assert not re.search(ring + "copy", program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "width=8 does not divide into heads=3"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=2"),
        ({"window": 0}, "window=0; it must be at least 1"),
        ({"head_width": 3}, "head width 3 with rotary positions; it must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(WIDTH, AttentionConfig(**({"heads": 2} | options)), rngs=nnx.Rngs(0))
