"""The selective scan's Pallas kernels, interpreted: the ladder, widths, dtypes, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import selective_scan
from scanax.kernels.dispatch import Target, on
from support.ladder import BY_NAME, with_gradients
from support.mixers import BATCH
from support.targets import HOPPER, INTERPRETED, interpreted_hopper

MIXER = BY_NAME["mamba"]


def run(x, reset, **how):
    with on(INTERPRETED):
        return MIXER.run(x, reset, implementation="pallas_tpu", **how)


def run_on_hopper(x, reset, **how):
    """By an interpreter that looks for races between threads and copies."""
    with on(interpreted_hopper(detect_races=True)):
        return MIXER.run(x, reset, implementation="pallas_gpu", **how)


def draw(time, width, size, dtype, delta=jnp.float32):
    """Inputs as a Mamba layer's, delta too in float32; decays of all strengths."""
    rng = np.random.default_rng(0)
    logs = rng.choice([0.0, 1e-4, 1.0, 30.0], (BATCH, time, width))
    tokens = {
        "u": rng.normal(size=(BATCH, time, width)),
        "delta": logs * rng.uniform(0.5, 1, logs.shape),
        "B": rng.normal(size=(BATCH, time, size)),
        "C": rng.normal(size=(BATCH, time, size)),
    }
    shared = {"A": -rng.uniform(0.5, 1, (width, size)), "D": rng.normal(size=width)}
    state = rng.normal(size=(BATCH, width, size))
    reset = rng.random((BATCH, time)) < 0.05
    inputs = {"tokens": jax.tree.map(lambda x: x.astype(dtype), tokens)}
    inputs["tokens"]["delta"] = tokens["delta"].astype(delta)
    inputs |= jax.tree.map(np.float32, {"shared": shared, "state": state})
    ct = rng.normal(size=logs.shape).astype(dtype), rng.normal(size=state.shape)
    return inputs, jax.tree.map(lambda x: x if x.dtype == dtype else np.float32(x), ct), reset


@pytest.mark.parametrize("width, size", [(200, 16), (384, 20), (513, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_widths_and_states(dtype, width, size):
    """Against float64 of the same rounded inputs: blocks of channels, padding of both."""
    inputs, ct, reset = draw(41, width, size, dtype)
    near(with_gradients(run)(inputs, ct, reset), inputs, ct, reset, dtype)


def near(got, inputs, ct, reset, dtype):
    """The largest error, or bfloat16's in root-mean-square ratio: rounding alone is 0.0017."""
    with jax.enable_x64(True):
        exact, exact_ct = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, ct))
        answer = jax.device_get(with_gradients(MIXER.meaning)(exact, exact_ct, reset))
    assert got[0][0].dtype == dtype
    bars = (1e-5, 1e-4) if dtype == jnp.float32 else (3e-3, 4e-3)
    for bar, ours, theirs in zip(bars, got, answer, strict=True):
        for x, true in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            error = np.abs(np.asarray(x, np.float64) - true)
            ratio = np.sqrt(np.mean(error**2) / np.mean(np.square(true)))
            worst = error.max() / np.abs(true).max()
            assert (worst if dtype == jnp.float32 else ratio) <= bar, (x.shape, worst, ratio)


@pytest.mark.parametrize(
    "time, width, size, delta, packed",
    [
        (37, 130, 16, jnp.float32, True),
        (16, 128, 20, jnp.bfloat16, True),
        (1, 6, 4, jnp.float32, False),
    ],
)
def test_hopper(time, width, size, delta, packed):
    """Three chunks and two programs of channels; N = 20, which is padded; a single token."""
    inputs, ct, reset = draw(time, width, size, jnp.bfloat16, delta)
    reset = reset if packed else np.zeros_like(reset)
    both = with_gradients(lambda x, r: run_on_hopper(x, r if packed else None))
    near(both(inputs, ct, reset), inputs, ct, reset, jnp.bfloat16)


@pytest.mark.parametrize("run", [run, run_on_hopper])
def test_not_even_a_nan_leaves_its_document(run):
    """Not forward, not backward, and not to a token of another document in the same tile."""
    dtype = jnp.bfloat16 if run is run_on_hopper else jnp.float32
    inputs, ct, _ = draw(24, 6, 4, dtype)
    reset = np.zeros((BATCH, 24), bool)
    reset[:, [5, 13]] = True
    both = with_gradients(run)
    (y, _), gradients = both(inputs, ct, reset)
    others = np.r_[0:5, 13:24]
    for name in ["u", "delta", "B", "C"] if dtype == jnp.float32 else ["delta"]:
        spoiled = dict(inputs["tokens"])
        spoiled[name] = np.where((np.arange(24) == 7)[:, None], np.nan, spoiled[name])
        spoiled[name] = spoiled[name].astype(inputs["tokens"][name].dtype)
        (y_, _), gradients_ = both(inputs | {"tokens": spoiled}, ct, reset)
        assert np.isnan(np.float32(y_[:, 7])).any()
        np.testing.assert_array_equal(np.float32(y_[:, others]), np.float32(y[:, others]))
        for part in gradients["tokens"]:
            ours, theirs = gradients_["tokens"][part], gradients["tokens"][part]
            np.testing.assert_array_equal(
                np.float32(ours[:, others]), np.float32(theirs[:, others])
            )
        np.testing.assert_array_equal(gradients_["state"], gradients["state"])


def test_what_is_refused_is_said(unchecked):
    def call(name, dtype=jnp.float32, size=4, **how):
        x, B = jnp.zeros((1, 8, 6), dtype), jnp.zeros((1, 8, size), dtype)
        A = jnp.zeros((6, size), jnp.float32)
        return selective_scan(x, x, A, B, B, implementation=name, **how)

    def refused(match, *args, **how):
        with pytest.raises(NotImplementedError, match=match):
            call(*args, **how)

    refused("it runs on TPUs, and this is cpu", "pallas_tpu")
    refused("it runs on Hopper GPUs .* and this is cpu", "pallas_gpu", jnp.bfloat16)
    with on(INTERPRETED):
        refused("multiples of 8 tokens for float32, not 12", "pallas_tpu", chunk=12)
        refused("multiples of 16 tokens for bfloat16, not 8", "pallas_tpu", jnp.bfloat16, chunk=8)
        refused("N=512 states are up to 16 tokens long", "pallas_tpu", chunk=64, size=512)
        refused("float32 or bfloat16, not float16", "pallas_tpu", jnp.float16)
    with on(HOPPER):
        refused("it takes bfloat16, not float32", "pallas_gpu")
        refused("up to N=32 numbers a channel, not 64", "pallas_gpu", jnp.bfloat16, size=64)
        refused("of 16 tokens for N=4, not 32", "pallas_gpu", jnp.bfloat16, chunk=32)
    with on(Target("gpu", "NVIDIA A100", "8.0")):
        refused("Hopper GPUs .* and this is NVIDIA A100", "pallas_gpu", jnp.bfloat16)
