"""What attention's kernels for Hopper GPUs are built from: a ring of tiles, and products with it.

The interpreter knows no accumulators that are read and written: for it, products are plain ones.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from .. import hopper

ROWS = 64  # of a warpgroup: those of a tensor core's product
OWN = 2 * ROWS  # tokens of the tile that two warpgroups own
STAGES = 2
LOG2E = math.log2(math.e)
SMALL, LARGE = 24, 240  # registers of a thread that copies, and of one that computes


def call(kernel, device, grid, names, outputs, scratch):
    """`kernel` over a grid, the first axis the fastest, by two warpgroups and one that copies."""
    return hopper.call(
        kernel,
        device,
        infer=True,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=names,
        num_threads=3,
        thread_name="warpgroup",
    )


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def down(x, like):
    """A number for each row, as a matrix."""
    return lax.broadcast_in_dim(x, like.shape, (0,))


def across(x, like):
    """A number for each column, as a matrix."""
    return lax.broadcast_in_dim(x, like.shape, (1,))


def plain(x, y):
    """x y for the interpreter."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def products(device, *pairs):
    """x y^T of pairs of matrices in shared memory."""
    if device.interpret:
        return [plain(x[...], y[...].T) for x, y in pairs]

    def run(*totals):
        for total, (x, y) in zip(totals, pairs, strict=True):
            gpu.wgmma(total, x, y.transpose((1, 0)))
        return [total[...] for total in totals]

    return pl.run_scoped(
        run, *(hopper.ACC((x.shape[0], y.shape[0]), jnp.float32) for x, y in pairs)
    )


def add(device, totals, terms):
    """total + x y for each term (x, y), x in registers and y in shared memory."""
    terms = [(x.astype(jnp.bfloat16), y) for x, y in terms]
    if device.interpret:
        return tuple(t + plain(x, y[...]) for t, (x, y) in zip(totals, terms, strict=True))

    def run(totals):
        for total, (x, y) in zip(totals, terms, strict=True):
            gpu.wgmma(total, x, y)

    return tuple(pl.run_state(run)(tuple(hopper.ACC.init(total) for total in totals)))


def put(x, stage, out, height=ROWS):
    """Registers to global memory, the first rows, by way of a narrow tile of shared memory."""
    width = stage.shape[1]
    for begin in range(0, x.shape[1], width):
        gpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage[...] = x[:, begin : begin + width].astype(stage.dtype)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(stage.at[:height], out.at[:, pl.ds(begin, width)])


def stage(dtype):
    """What `put` needs, a line of 128 bytes for each row."""
    return gpu.SMEM((2, ROWS, 128 // jnp.dtype(dtype).itemsize), dtype)


def fill(owned, loaded, count, *parts):
    """The copying warpgroup: what the program owns, then item after item into the ring.

    `owned` are pairs of a source and a buffer, their barrier `loaded`. A part of an item is (such
    pairs of item n, filled, freed): a slot is filled once it is free again.
    """
    gpu.set_max_registers(SMALL, action="decrease")
    for source, buffer in owned:
        gpu.copy_gmem_to_smem(source, buffer, loaded)

    def step(n, _):
        slot = lax.rem(n, jnp.int32(STAGES))
        for copies, filled, freed in parts:
            pl.when(n >= STAGES)(lambda freed=freed: gpu.barrier_wait(freed.at[slot]))

            @pl.when(n < count)
            def _(copies=copies, filled=filled):
                for source, buffer in copies(n):
                    gpu.copy_gmem_to_smem(source, buffer.at[slot], filled.at[slot])

    lax.fori_loop(0, count + STAGES, step, None)


def release(freed, loaded=True):
    """A slot may be filled again; if it was `loaded`, not only multiplied, copies wait for that."""
    if loaded:
        gpu.commit_smem()
    gpu.barrier_arrive(freed)


def ring(copies):
    """Barriers of one part: copied into by `copies` copies, read by two warpgroups."""
    filled = gpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
    return filled, gpu.Barrier(num_arrivals=2, num_barriers=STAGES)


def hide(whole, see, x):
    """Each of x where `see()`, 0 elsewhere, if not the whole tile is seen."""
    return lax.cond(whole, lambda *x: x, lambda *x: tuple(jnp.where(see(), y, 0) for y in x), *x)


def divide(x, by):
    """Quotient and remainder."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))
