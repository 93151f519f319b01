"""What the checks without hardware catch: tiles, bounds and waits that are wrong on purpose.

Each fault is caught by one of them: a wrong tile by lowering, a read past the end and a missing
wait by the TPU interpreter. Then that interpreter watches every kernel of ours.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from scanax.kernels import attention, fixed_query, linear_attention, pallas, selective_scan
from scanax.kernels.dispatch import Target, on
from support.targets import TPU

RACES = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
WATCHED = Target("tpu", "TPU v5 lite", interpret=pltpu.InterpretParams(detect_races=True))


def double(block, kernel=None, **how):
    """A kernel over 256 x 512 numbers in tiles."""

    def plain(x, y):
        y[...] = 2 * x[...]

    spec = pl.BlockSpec(block, lambda i, j: (i, j))
    return {
        "kernel": kernel or plain,
        "semantics": ("parallel", "parallel"),
        "grid": (256 // block[0], 512 // block[1]),
        "in_specs": [spec],
        "out_specs": spec,
        "out_shape": pallas.shape(256, 512),
    } | how


def lower(device, **how):
    kernel = how.pop("kernel")
    run = jax.jit(lambda x: pallas.tpu_call(kernel, device, **how)(x))
    return run.trace(pallas.shape(256, 512)).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("block", [(100, 100), (4, 128), (8, 64)])
def test_a_wrong_tile_does_not_lower(block):
    assert "tpu_custom_call" in lower(TPU, **double((8, 128))).as_text()
    with pytest.raises(ValueError, match="divisible by 8 and 128"):
        lower(TPU, **double(block))


@pytest.mark.parametrize("first", [24, 32])
def test_a_read_past_the_end_is_caught(first):
    def kernel(start, x, y):
        y[...] = x[pl.ds(start[0], 8), :]

    call = pallas.tpu_call(
        kernel,
        WATCHED,
        semantics=(),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec((32, 128))],
        out_shape=pallas.shape(8, 128),
    )
    start, x = jnp.full(1, first, jnp.int32), jnp.ones((32, 128), jnp.float32)
    if first + 8 <= 32:
        np.testing.assert_array_equal(call(start, x), 1)
    else:
        with pytest.raises(Exception, match=r"(?i)out-of-bounds read"):
            jax.block_until_ready(call(start, x))


def copied(wait):
    """x by a copy of its own into VMEM, read after waiting for it or at once."""

    def kernel(x, y, buffer, semaphore):
        copy = pltpu.make_async_copy(x, buffer, semaphore)
        copy.start()
        if wait:
            copy.wait()
        y[...] = buffer[...]
        if not wait:
            copy.wait()

    return pallas.tpu_call(
        kernel,
        WATCHED,
        semantics=(),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=pallas.shape(8, 128),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )


def races(call):
    """Whether the interpreter saw a race: it says so in a flag, and newer versions also raise."""
    try:
        jax.block_until_ready(call())
    except Exception as error:
        assert "RACE" in str(error)
        return True
    return RACES.races.races_found


@pytest.mark.parametrize("wait", [True, False])
def test_a_missing_wait_is_caught(wait, capfd):
    x = jnp.ones((8, 128), jnp.float32)
    assert races(lambda: copied(wait)(x)) == (not wait)


def normal(rng, *size):
    return jnp.asarray(rng.normal(size=size), jnp.float32)


def tiny(name):
    """Values and gradients over two chunks or tiles and two heads."""
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 20, heads, 8) for heads in (2, 1, 2))
    reset = jnp.zeros((1, 20), bool).at[0, 13].set(True)
    how = {"reset": reset, "implementation": "pallas_tpu"}
    if name == "attention":
        return lambda: pulled(lambda *x: attention(*x, block=16, **how), q, k, k)
    if name == "decode":
        index = jnp.full((1, 1), 15, jnp.int32)
        how = {"q_index": index, "block": 16, "implementation": "pallas_tpu"}
        return lambda: attention(q[:, :1], k, k, **how)
    if name == "fixed_query":
        return lambda: pulled(lambda *x: fixed_query(*x, chunk=16, **how), q[0, 0], k, k)
    if name == "selective_scan":
        u, B = normal(rng, 1, 20, 4), normal(rng, 1, 20, 8)
        A = -jnp.ones((4, 8), jnp.float32)
        args = u, jnp.abs(u), A, B, B
        return lambda: pulled(lambda *x: selective_scan(*x, chunk=16, **how), *args)
    log = -jnp.abs(normal(rng, 1, 20, 2, *(8,) * (name == "vector")))
    return lambda: pulled(lambda *x: linear_attention(*x, chunk=16, **how), q, k, v, log)


def pulled(run, *args):
    out, pull = jax.vjp(run, *args)
    return out, pull(jax.tree.map(jnp.ones_like, out))


@pytest.mark.parametrize(
    "name", ["vector", "scalar", "attention", "decode", "fixed_query", "selective_scan"]
)
def test_our_kernels_race_nowhere_and_stay_within_bounds(name):
    call = jax.jit(tiny(name))
    with on(Target("tpu", "TPU v5 lite", interpret=True)):
        expected = jax.jit(tiny(name))()

    def watched():
        with on(WATCHED):
            return call()

    assert not races(watched)
    for x, y in zip(jax.tree.leaves(watched()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
