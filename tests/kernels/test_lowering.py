"""Every kernel lowers for the hardware it is for, which need not be here: shapes, dtypes, tiles."""

import jax
import jax.numpy as jnp
import pytest
from scanax.kernels.dispatch import on
from support.lowered import CASES, WIDTHS, case
from support.targets import HOPPER, TPU

DEVICES = {
    "tpu": (TPU, "pallas_tpu", "tpu_custom_call"),
    "cuda": (HOPPER, "pallas_gpu", "mosaic_gpu"),
}
DTYPES = {"tpu": (jnp.float32, jnp.bfloat16), "cuda": (jnp.bfloat16,)}
LOWERED = [
    (name, platform, width, dtype, width == 64)  # documents at one width: they change no tile
    for platform in DEVICES
    for name in CASES
    for width in (WIDTHS[:1] if jax.config.jax_enable_x64 else WIDTHS)
    for dtype in DTYPES[platform]
]


def name_of(one):
    name, platform, width, dtype, _ = one
    return f"{name}-{platform}-{width}-{dtype.__name__}"


@pytest.mark.parametrize("one", LOWERED, ids=name_of)
def test_lowers(one):
    name, platform, width, dtype, packed = one
    device, implementation, call = DEVICES[platform]
    run, arrays = case(name, implementation, width, width, dtype, packed)
    with on(device):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= (1 if name == "decode" else 2)  # forward and backward
