"""The kernels for Hopper GPUs: interpreted against the recurrence, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import dispatch, linear_attention
from support.compare import close, rms
from support.ladder import resets, with_gradients
from support.mixers import BATCH, draw_linear, mean_linear, run_linear
from support.targets import HOPPER, interpreted_hopper

BAR = 0.005  # root mean square, against float64 of the same rounded inputs
BY_NAME = {"implementation": "pallas_gpu"}


def draw(kind, groups, time, case, key, value, seed=0):
    """Inputs as the kernel takes them: bfloat16 tokens, float32 decays and state."""
    rng = np.random.default_rng(seed)
    inputs = draw_linear(kind, groups, rng, time, case, heads=max(groups), key=key, value=value)

    def rounded(path, x):
        name = path[-1].key
        return jnp.asarray(x, jnp.bfloat16 if name in ("q", "k", "v") else jnp.float32)

    return jax.tree.map_with_path(rounded, inputs), jnp.asarray(resets(rng, time))


def in_float64(x):
    return jnp.asarray(np.asarray(x, np.float64))


@pytest.mark.parametrize(
    ("kind", "groups", "time", "case", "key", "value", "packed"),
    [
        ("scalar", (2, 1, 2), 131, "mixed", 64, 64, True),
        ("vector", (2, 1, 1), 131, "mixed", 64, 64, True),
        ("constant", (1, 2, 1), 131, "mild", 64, 64, False),
        ("scalar", (1, 1, 1), 131, "mild", 128, 64, True),
        ("vector", (1, 1, 1), 65, "mild", 64, 128, False),
        ("vector", (1, 1, 1), 64, "mixed", 128, 64, False),
        ("constant", (1, 1, 1), 1, "mild", 64, 128, True),
    ],
)
def test_it_is_the_recurrence(kind, groups, time, case, key, value, packed):
    """Values and all gradients, with races between copies and products looked for."""
    inputs, reset = draw(kind, groups, time, case, key, value)
    if not packed:
        reset = None
    shapes = jax.eval_shape(lambda x: run_linear(x, reset), inputs)
    rng = np.random.default_rng(1)
    ct = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    with dispatch.on(interpreted_hopper(detect_races=jax.__version_info__ >= (0, 11))):
        got = with_gradients(lambda x, r: run_linear(x, r, **BY_NAME))(inputs, ct, reset)
    with jax.enable_x64(True):
        exact, exact_ct = jax.tree.map(in_float64, (inputs, ct))
        mask = np.zeros((BATCH, time), bool) if reset is None else reset
        expected = with_gradients(mean_linear)(exact, exact_ct, mask)
        expected = jax.tree.map(np.asarray, expected)
    rms(got, expected, BAR)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_what_overflows_stays_in_its_document(kind):
    """Documents share a chunk; one overflows on the way, the others are as if it were not there."""
    inputs, _ = draw(kind, (1, 1, 1), 64, "mild", 64, 64)
    reset = jnp.zeros((BATCH, 64), bool).at[:, np.array([20, 40])].set(True)
    ct = jax.tree.map(jnp.ones_like, run_linear(inputs, reset))
    loud = jax.tree.map(lambda x: x, inputs)
    for name in "qkv":
        loud["tokens"][name] = inputs["tokens"][name].at[:, 20:40].set(3e38)
    with dispatch.on(interpreted_hopper()):
        run = with_gradients(lambda x, r: run_linear(x, r, **BY_NAME))
        quiet, loud = run(inputs, ct, reset), run(loud, ct, reset)
    (y, state), gradients = loud
    assert not np.isfinite(np.asarray(y[:, 20:40], np.float32)).all()
    keep = np.r_[0:20, 40:64]
    of_tokens = [jax.tree.map(lambda x: x[:, keep], g["tokens"]) for g in (gradients, quiet[1])]
    close((y[:, keep], state, of_tokens[0]), (quiet[0][0][:, keep], quiet[0][1], of_tokens[1]), 0)


def both(q, k, v, log_decay, state, reset):
    """The outputs and all gradients of one call, whatever implementation takes it."""

    def run(*inputs):
        *inputs, state = inputs
        return linear_attention(*inputs, state=state, reset=reset)

    out, pull = jax.vjp(run, q, k, v, log_decay, state)
    return out, pull(jax.tree.map(jnp.ones_like, out))


@pytest.mark.parametrize(("K", "V"), [(64, 256), (256, 64)])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_keys_and_values_of_unequal_widths_lower(kind, K, V):
    """In long rows, its shared memory counted: it is what a Hopper GPU runs unasked."""
    B, T, H = 2, 8192, 4
    shapes = {"scalar": (B, T, H), "vector": (B, T, H, K)}

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    log_decay = array(*shapes[kind], dtype=jnp.float32)
    q, k, v = array(B, T, H, K), array(B, T, 2, K), array(B, T, H, V)
    state, reset = array(B, H, K, V, dtype=jnp.float32), array(B, T, dtype=jnp.bool_)
    with dispatch.on(HOPPER), dispatch.record() as ran:
        traced = jax.jit(both).trace(q, k, v, log_decay, state, reset)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ran == [("linear_attention", "pallas_gpu")]
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({}, dispatch.Target("cpu", "cpu"), "it runs on Hopper GPUs .*, and this is cpu"),
        ({}, dispatch.Target("gpu", "NVIDIA A100", "8.0"), "this is NVIDIA A100"),
        ({"dtype": jnp.float32}, HOPPER, "it takes bfloat16, not float32"),
        ({"key": 96}, HOPPER, "its key widths are multiples of 64 up to 256, not 96"),
        ({"value": 320}, HOPPER, "its value widths are multiples of 64 up to 256, not 320"),
        ({"chunk": 32}, HOPPER, "its chunks are of 64 tokens, not 32"),
    ],
)
def test_what_it_refuses(change, device, message):
    how = {"key": 64, "value": 64, "dtype": jnp.bfloat16, "chunk": None} | change
    q, v = (jnp.zeros((1, 3, 1, how[name]), how["dtype"]) for name in ("key", "value"))
    with dispatch.on(device), pytest.raises(NotImplementedError, match=message):
        linear_attention(q, q, v, jnp.zeros(1), chunk=how["chunk"], **BY_NAME)
