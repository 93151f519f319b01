"""The fixed-query kernels for Hopper GPUs, interpreted, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import dispatch, fixed_query
from support.compare import close, rms
from support.ladder import resets, with_gradients
from support.mixers import BATCH, SPREAD, draw_fixed_query, mean_fixed_query, run_fixed_query
from support.targets import HOPPER, interpreted_hopper

BAR = 0.005  # root mean square, against float64 of the same rounded inputs
BY_NAME = {"implementation": "pallas_gpu"}


def draw(time, case, key=64, value=64):
    """Inputs as the kernel takes them: bfloat16 tokens and queries, a float32 state."""
    rng = np.random.default_rng(0)
    inputs = draw_fixed_query(rng, time, case, key=key, value=value)

    def rounded(path, x):
        of_state = path[0].key == "state"
        return jnp.asarray(x, jnp.float32 if of_state else jnp.bfloat16)

    return jax.tree.map_with_path(rounded, inputs), jnp.asarray(resets(rng, time))


def cotangents(inputs, reset):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda x: run_fixed_query(x, reset), inputs)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def compared(inputs, reset, target):
    """(by the kernels, by the recurrence): values and all gradients."""
    ct = cotangents(inputs, reset)
    with dispatch.on(target):
        got = with_gradients(lambda x, r: run_fixed_query(x, r, **BY_NAME))(inputs, ct, reset)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, ct))
        mask = np.zeros(inputs["tokens"]["k"].shape[:2], bool) if reset is None else reset
        return got, jax.tree.map(np.asarray, with_gradients(mean_fixed_query)(*exact, mask))


@pytest.mark.parametrize(
    ("time", "case", "key", "value", "packed"),
    [
        *((131, case, 64, 64, case != "minus10") for case in SPREAD),
        (131, "mild", 24, 64, False),
        (65, "mild", 64, 128, True),
        (64, "minus30", 64, 64, False),
        (1, "mild", 64, 64, True),
        (1, "mild", 64, 64, False),
    ],
)
def test_it_is_the_recurrence(time, case, key, value, packed):
    """Values and all gradients, with races between copies and products looked for."""
    inputs, reset = draw(time, case, key, value)
    target = interpreted_hopper(detect_races=jax.__version_info__ >= (0, 11))
    rms(*compared(inputs, reset if packed else None, target), BAR)


def test_equal_scores_share_the_maximum_as_the_recurrence_has_it():
    """The maximum is 0, that of the state too; values are far from 0, and only v - y counts."""
    inputs, reset = draw(131, "mild")
    k, v = inputs["tokens"]["k"], inputs["tokens"]["v"]
    inputs["tokens"] = {"k": -jnp.abs(k).at[:, ::9].set(0), "v": v + 10}
    inputs["shared"]["q"] = jnp.abs(inputs["shared"]["q"])
    m, *rest = inputs["state"]
    inputs["state"] = (0 * m, *rest)
    rms(*compared(inputs, reset.at[0].set(False), interpreted_hopper()), BAR)


def test_a_state_of_nothing_under_a_maximum():
    """Its normaliser is 0: none of it is read, but its gradient is there."""
    inputs, _ = draw(65, "mild")
    m, u, w = inputs["state"]
    inputs["state"] = m + 20, 0 * u, 0 * w
    rms(*compared(inputs, None, interpreted_hopper()), BAR)


def test_what_overflows_stays_in_its_document():
    """One within a chunk, one across two; the others are as if they were not there."""
    inputs, _ = draw(131, "mild")
    reset = jnp.zeros((BATCH, 131), bool).at[:, np.array([20, 40, 50, 80])].set(True)
    ct = jax.tree.map(jnp.ones_like, cotangents(inputs, reset))
    tokens = inputs["tokens"]
    tokens = {
        "k": tokens["k"].at[:, 20:40].set(3e38),
        "v": tokens["v"].at[:, 20:40].set(3e38).at[:, 50:80].set(3e38),
    }
    with dispatch.on(interpreted_hopper()):
        run = with_gradients(lambda x, r: run_fixed_query(x, r, **BY_NAME))
        quiet, loud = run(inputs, ct, reset), run(inputs | {"tokens": tokens}, ct, reset)
    assert not np.isfinite(np.asarray(loud[0][0][:, 20:40], np.float32)).all()
    assert not np.isfinite(np.asarray(loud[1]["tokens"]["k"][:, 50:80], np.float32)).all()
    keep = np.r_[0:20, 40:50, 80:131]

    def outside(out):
        (y, state), gradients = out
        return (
            y[:, keep],
            state,
            gradients["state"],
            [g[:, keep] for g in gradients["tokens"].values()],
        )

    close(outside(loud), outside(quiet), 0)


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({}, dispatch.Target("cpu", "cpu"), "it runs on Hopper GPUs .*, and this is cpu"),
        ({"dtype": jnp.float32}, HOPPER, "it takes bfloat16, not float32"),
        ({"value": 96}, HOPPER, "its value widths are multiples of 64 up to 256, not 96"),
        ({"value": 320}, HOPPER, "its value widths are multiples of 64 up to 256, not 320"),
        ({"chunk": 32}, HOPPER, "its chunks are of 64 tokens, not 32"),
    ],
)
def test_what_it_refuses(change, device, message):
    how = {"value": 64, "dtype": jnp.bfloat16, "chunk": None} | change
    k, v = (jnp.zeros((1, 3, 1, width), how["dtype"]) for width in (24, how["value"]))
    with dispatch.on(device), pytest.raises(NotImplementedError, match=message):
        fixed_query(k[0, :1, 0], k, v, chunk=how["chunk"], **BY_NAME)
