"""The selective scan's Pallas kernels, interpreted: the ladder, widths, dtypes, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import selective_scan
from scanax.kernels.dispatch import Target, on
from support.ladder import BY_NAME, check, problem, with_gradients
from support.mixers import BATCH, CASES

TPU = Target("tpu", "TPU v5 lite", interpret=True)
MIXER = BY_NAME["mamba"]


def run(x, reset, **how):
    with on(TPU):
        return MIXER.run(x, reset, implementation="pallas_tpu", **how)


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("time", [1, 2, 131])
def test_the_recurrence(time, chunk):
    """Packed; without documents too, by the path that reads no resets."""
    for documents in (True, False):
        both = with_gradients(lambda x, r: run(x, r if documents else None, chunk=chunk))  # noqa: B023
        for case in CASES:
            inputs, ct, reset, answer = problem("mamba", case, jnp.float32, time, documents)
            check(MIXER, case, jnp.float32, both(inputs, ct, reset), answer)


def draw(time, width, size, dtype):
    """Inputs as a Mamba layer's: decays of all strengths."""
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
    inputs |= jax.tree.map(np.float32, {"shared": shared, "state": state})
    ct = rng.normal(size=logs.shape).astype(dtype), rng.normal(size=state.shape)
    return inputs, jax.tree.map(lambda x: x if x.dtype == dtype else np.float32(x), ct), reset


@pytest.mark.parametrize("width, size", [(200, 16), (384, 20), (513, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_widths_and_states(dtype, width, size):
    """Against float64 of the same rounded inputs: blocks of channels, padding of both."""
    inputs, ct, reset = draw(41, width, size, dtype)
    got = with_gradients(run)(inputs, ct, reset)
    with jax.enable_x64(True):
        exact, exact_ct = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, ct))
        answer = jax.device_get(with_gradients(MIXER.meaning)(exact, exact_ct, reset))
    assert got[0][0].dtype == dtype
    for part, bars in zip((0, 1), ({4: 1e-5, 2: 3e-3}, {4: 1e-4, 2: 4e-3}), strict=True):
        for x, true in zip(jax.tree.leaves(got[part]), jax.tree.leaves(answer[part]), strict=True):
            error = np.abs(np.asarray(x, np.float64) - true)
            worst = error.max() / np.abs(true).max()
            ratio = np.sqrt((error**2).mean() / np.mean(np.square(true)))
            bar = bars[jnp.dtype(dtype).itemsize]
            assert (worst if dtype == jnp.float32 else ratio) <= bar, (x.shape, worst, ratio)


def test_not_even_a_nan_leaves_its_document():
    """Not forward, not backward, and not to a token of another document in the same tile."""
    inputs, ct, _ = draw(24, 6, 4, jnp.float32)
    reset = np.zeros((BATCH, 24), bool)
    reset[:, [5, 13]] = True
    (y, _), gradients = with_gradients(run)(inputs, ct, reset)
    for name in inputs["tokens"]:
        spoiled = dict(inputs["tokens"])
        spoiled[name] = np.where((np.arange(24) == 7)[:, None], np.nan, spoiled[name])
        (y_, _), gradients_ = with_gradients(run)(inputs | {"tokens": spoiled}, ct, reset)
        others = np.r_[0:5, 13:24]
        np.testing.assert_array_equal(y_[:, others], y[:, others])
        for part in gradients["tokens"]:
            ours, theirs = gradients_["tokens"][part], gradients["tokens"][part]
            np.testing.assert_array_equal(ours[:, others], theirs[:, others])
        np.testing.assert_array_equal(gradients_["state"], gradients["state"])


def test_what_is_refused_is_said(unchecked):
    def call(dtype=jnp.float32, size=4, **how):
        x, B = jnp.zeros((1, 8, 6), dtype), jnp.zeros((1, 8, size), dtype)
        A = jnp.zeros((6, size), jnp.float32)
        return selective_scan(x, x, A, B, B, implementation="pallas_tpu", **how)

    with pytest.raises(NotImplementedError, match="it runs on TPUs, and this is cpu"):
        call()
    with on(TPU):
        with pytest.raises(NotImplementedError, match="multiples of 8 tokens for float32, not 12"):
            call(chunk=12)
        with pytest.raises(NotImplementedError, match="multiples of 16 tokens for bfloat16, not 8"):
            call(jnp.bfloat16, chunk=8)
        with pytest.raises(NotImplementedError, match="N=512 states are up to 16 tokens long"):
            call(chunk=64, size=512)
        with pytest.raises(NotImplementedError, match="float32 or bfloat16, not float16"):
            call(jnp.float16)
