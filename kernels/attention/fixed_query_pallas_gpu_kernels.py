"""The kernels of `fixed_query_pallas_gpu.py`: walks along the chunks, from the first or the last.

Tokens are (B, T, heads, V) as the caller has them. `rows` (B, N, H, 5, C) holds for each token its
score, the maximum and the first place of its document in the chunk, 1 / u and its share of the mean
that came in. A program takes one row, one head and 64 values; the tiles of the chunk after the next
are copied while this one and the next are computed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from .. import hopper
from ..hopper import TILE, Warpgroup, tiles
from .fixed_query_pallas_gpu import times

CHUNK = TILE
SCORE, TOP, FIRST, INVERSE, SHARE = range(5)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def spread(x, axis):
    """Numbers along `axis` as a matrix of equal rows or columns."""
    return jax.lax.broadcast_in_dim(x, (CHUNK, TILE), (axis,))


def weights(warps, rows):
    """(a, whether the row sees the column), C x C."""
    i, j = (warps.index((CHUNK, CHUNK), axis).astype(jnp.float32) for axis in (0, 1))
    seen = (i >= j) & (j >= warps.down(rows.at[FIRST]))
    above = warps.across(rows.at[SCORE]) - warps.down(rows.at[TOP])
    weight = jnp.exp(jnp.where(seen, above, jnp.float32(0))) * warps.down(rows.at[INVERSE])
    return jnp.where(seen, weight, jnp.float32(0)), seen


def in_two(x):
    """A matrix as the sum of two of bfloat16: 16 bits, for weights that have to sum to one."""
    high = jax.lax.optimization_barrier(x.astype(jnp.bfloat16))  # XLA would undo the rounding
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def last(warps):
    """True in the last row."""
    return warps.index((CHUNK, TILE), 0) == CHUNK - 1


def walk(device, v, rows, mean):
    """y (B, T, H, V), and the means after every chunk, (B, N, H, V) in float32."""
    batch, chunks, heads = rows.shape[:3]
    ratio = heads // v.shape[2]

    def kernel(v_all, rows_all, mean, y, after, v_slots, rows_slots, inner, rest, out, ready):
        row, head, part = (jax.lax.axis_index(name) for name in ("row", "head", "values"))
        values, group = pl.ds(part * TILE, TILE), jax.lax.div(head, jnp.int32(ratio))
        warps = Warpgroup(device)

        def fetch(n, slot):
            tokens = pl.ds(n * CHUNK, CHUNK)
            of_v = v_all.at[row, tokens, group, values]
            gpu.copy_gmem_to_smem(of_v, v_slots.at[slot], ready.at[slot])
            gpu.copy_gmem_to_smem(rows_all.at[row, n, head], rows_slots.at[slot], ready.at[slot])

        def step(n, mean):
            slot = jax.lax.rem(n, jnp.int32(2))
            gpu.barrier_wait(ready.at[slot])
            rows = rows_slots.at[slot]
            weight = weights(warps, rows)[0]
            inner[...], rest[...] = in_two(weight)
            gpu.wait_smem_to_gmem(0, wait_read_only=True)  # `out` has left
            gpu.commit_smem()
            mean = times(warps.down(rows.at[SHARE]), spread(mean, 1))
            mean += warps.dot("ij,jv->iv", inner, v_slots.at[slot])
            mean += warps.dot("ij,jv->iv", rest, v_slots.at[slot])
            out[...] = mean.astype(jnp.bfloat16)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(out, y.at[row, pl.ds(n * CHUNK, CHUNK), head, values])
            mean = jnp.sum(jnp.where(last(warps), mean, jnp.float32(0)), axis=0)
            after.at[row, n, head, values][...] = mean

            @pl.when(n + 2 < chunks)
            def _():
                fetch(n + 2, slot)

            return mean

        for n in range(min(2, chunks)):
            fetch(n, n)
        initial = warps.from_global(mean.at[row, head, values], gpu.Layout.WGMMA.reduce(0))
        jax.lax.fori_loop(0, chunks, step, initial)
        gpu.wait_smem_to_gmem(0)

    run = hopper.call(
        kernel,
        device,
        out_type=[
            shape(batch, v.shape[1], heads, v.shape[3], dtype=v.dtype),
            shape(batch, chunks, heads, v.shape[3]),
        ],
        scratch_types=[
            tiles(2, CHUNK, TILE),
            gpu.SMEM((2, *rows.shape[3:]), jnp.float32),
            tiles(CHUNK, CHUNK),
            tiles(CHUNK, CHUNK),
            tiles(CHUNK, TILE),
            gpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        grid=(batch, heads, v.shape[3] // TILE),
        grid_names=("row", "head", "values"),
    )
    return run(v, rows, mean)


def walk_back(device, v, dy, rows, before, d_mean):
    """(dv (B, T, H, V), d_mean before the first chunk, inside (B, N, H, V / 64, 2, C)).

    `before` are the means before every chunk, d_mean the cotangent of the last one. Of each 64
    values, inside holds sum_t a_ts dy_t . (v_s - y_t) of each s and dy_t . (mean - y_t) of each t.
    """
    batch, chunks, heads = rows.shape[:3]
    ratio, parts = heads // v.shape[2], v.shape[3] // TILE
    inputs = [v, dy, rows, before, d_mean]

    def kernel(*refs):
        *sources, final = refs[:5]
        (dv, initial, inside), (*slots, inner, rest, out, ready) = refs[5:8], refs[8:]
        row, head, part = (jax.lax.axis_index(name) for name in ("row", "head", "values"))
        values, group = pl.ds(part * TILE, TILE), jax.lax.div(head, jnp.int32(ratio))
        warps = Warpgroup(device)

        def fetch(n, slot):
            place = chunks - 1 - n
            tokens = pl.ds(place * CHUNK, CHUNK)
            where = (
                (row, tokens, group, values),
                (row, tokens, head, values),
                (row, place, head),
                (row, place, head, values),
            )
            for source, at, buffer in zip(sources, where, slots, strict=True):
                gpu.copy_gmem_to_smem(source.at[at], buffer.at[slot], ready.at[slot])

        def step(n, d_mean):
            slot, place = jax.lax.rem(n, jnp.int32(2)), chunks - 1 - n
            gpu.barrier_wait(ready.at[slot])
            v, dy, rows, before = (buffer.at[slot] for buffer in slots)
            weight, seen = weights(warps, rows)
            inner[...], rest[...] = in_two(weight)
            d = warps.tile(dy) + jnp.where(last(warps), spread(d_mean, 1), jnp.float32(0))
            dy[...] = d.astype(jnp.bfloat16)
            gpu.wait_smem_to_gmem(0, wait_read_only=True)  # `out` has left
            gpu.commit_smem()
            share = warps.down(rows.at[SHARE])
            d_mean = jnp.sum(times(share, d), axis=0)

            mean = warps.across(before)
            y = times(share, mean)
            y += warps.dot("ij,jv->iv", inner, v)
            y += warps.dot("ij,jv->iv", rest, v)
            chunk = inside.at[row, place, head, part]
            chunk.at[1][...] = jnp.sum(d * (mean - y), axis=1)
            rounded = warps.tile(dy)  # as the product has it: dy . v - dy . y keeps its digits
            own = jnp.sum(rounded * y, axis=1)
            of_pairs = weight * (warps.dot("iv,jv->ij", dy, v) - spread(own, 0))
            chunk.at[0][...] = jnp.sum(jnp.where(seen, of_pairs, jnp.float32(0)), axis=0)

            out[...] = warps.dot("ij,iv->jv", inner, dy).astype(jnp.bfloat16)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(out, dv.at[row, pl.ds(place * CHUNK, CHUNK), head, values])

            @pl.when(n + 2 < chunks)
            def _():
                fetch(n + 2, slot)

            return d_mean

        for n in range(min(2, chunks)):
            fetch(n, n)
        d_mean = warps.from_global(final.at[row, head, values], gpu.Layout.WGMMA.reduce(0))
        initial.at[row, head, values][...] = jax.lax.fori_loop(0, chunks, step, d_mean)
        gpu.wait_smem_to_gmem(0)

    run = hopper.call(
        kernel,
        device,
        out_type=[
            shape(*dy.shape, dtype=v.dtype),
            shape(*d_mean.shape),
            shape(batch, chunks, heads, parts, 2, CHUNK),
        ],
        scratch_types=[
            tiles(2, CHUNK, TILE),
            tiles(2, CHUNK, TILE),
            gpu.SMEM((2, *rows.shape[3:]), jnp.float32),
            gpu.SMEM((2, TILE), jnp.float32),
            tiles(CHUNK, CHUNK),
            tiles(CHUNK, CHUNK),
            tiles(CHUNK, TILE),
            gpu.Barrier(num_arrivals=4, num_barriers=2),
        ],
        grid=(batch, heads, parts),
        grid_names=("row", "head", "values"),
    )
    return run(*inputs)
