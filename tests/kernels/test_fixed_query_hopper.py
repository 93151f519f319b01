"""The fixed-query kernels for Hopper GPUs, interpreted, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import dispatch, fixed_query
from support.compare import close, rms
from support.ladder import resets, with_gradients
from support.mixers import BATCH, SPREAD, draw_fixed_query, mean_fixed_query, run_fixed_query

BAR = 0.005  # root mean square, against float64 of the same rounded inputs
H200 = dispatch.Target("gpu", "NVIDIA H200", capability="9.0")
BY_NAME = {"implementation": "pallas_gpu"}


def interpreted(**how):
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams as Parameters
    except ImportError:  # before JAX 0.11
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as Parameters
    return dispatch.Target("gpu", "NVIDIA H200", "9.0", interpret=Parameters(**how))


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
    target = interpreted(detect_races=jax.__version_info__ >= (0, 11))
    rms(*compared(inputs, reset if packed else None, target), BAR)
