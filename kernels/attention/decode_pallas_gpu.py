"""One query a row against a cache, for Hopper GPUs: the cache is read once, as it lies.

That is (B, G, S, K), of which the arguments are transposes; others are copied first.

An output is the heads of one row that read one group of keys, up to 64 of them: the rows of a
tensor core's product, filled up with zeros, which is free where memory is what is waited for.
`decode` deals the tiles of keys to workers; a program is two of them, each a warpgroup with a ring
of tiles of its own, and a third that fills both, or one where the tiles are wide.

No copy of the cache is made to read bad rows as nan or zeros: 0 k^T + 0 v^T is added to the scores,
by the tensor cores, which is nan where a key or its value is not finite and else zero. Then the
values that are not finite are put to zero in the tile.

Bytes: each key and value that is seen once, 2 (K + V), the least there is, in tiles of 64, and a
partial state of (8 + 4 V) for each head, output or worker, which XLA merges. A cache whose length
is no multiple of 64 is copied first. Shared memory: up to 214 KiB, 128 of them for keys and values.
"""

from functools import partial

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from .. import hopper
from ..monoid import LOWEST
from . import decode, tiles
from .pallas_gpu_tiles import (
    LARGE,
    LOG2E,
    ROWS,
    SMALL,
    across,
    add,
    call,
    divide,
    down,
    plain,
    put,
    release,
    shape,
    stage,
)

TILE, LINE = 64, 64  # keys at a time; numbers of a swizzled line
ROOM = 192 << 10  # bytes of shared memory for tiles and queries
CORES = {"NVIDIA H100 PCIe": 114}  # 132 where not named


def scores(device, q, k, v):
    """q k^T, and nan where a key or its value is not finite."""
    zero = jnp.full((ROWS, LINE), 0, jnp.bfloat16)
    lines = [x.at[:, pl.ds(n, LINE)] for x in (k, v) for n in range(0, x.shape[1], LINE)]
    if device.interpret:
        return plain(q[...], k[...].T) + sum(plain(zero, line[...].T) for line in lines)

    def run(total):
        gpu.wgmma(total, q, k.transpose((1, 0)))
        for line in lines:
            gpu.wgmma(total, zero, line.transpose((1, 0)))
        return total[...]

    return pl.run_scoped(run, hopper.ACC((ROWS, k.shape[0]), jnp.float32))


def clean(v):
    """Non-finite values are put to zero.

    In every tile: to ask whether one holds any takes a sum over a warpgroup's warps, for which
    Mosaic GPU has one place in shared memory, and here two warpgroups would use it at once.
    """
    for n in range(0, v.shape[1], LINE):
        line = v.at[:, pl.ds(n, LINE)]
        x = line[...]
        finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
        line[...] = jnp.where(finite, x, jnp.zeros_like(x))
    gpu.commit_smem()


def _kernel(device, factor, groups, sizes, *refs):
    q, k, v, index, interval, counts, plan, numbers, weighted, *scratch = refs
    q_ring, k_ring, v_ring, i_ring, out, sums, q_filled, q_freed, filled, freed = scratch
    parts, stages, height = sizes
    program, warps = lax.axis_index("program"), lax.axis_index("warpgroup")

    def step_of(worker, n):
        """(output, row, group, tile, slot, starts) of a worker's n-th step."""
        output, tile, slot, starts = (plan[worker, n, i] for i in range(4))
        return output, *divide(output, groups), tile, slot, starts > 0

    def consume(part):
        gpu.set_max_registers(LARGE, action="increase")
        worker = program * parts + part
        count = counts[worker]

        def leave(n, m, u, w):
            at = step_of(worker, n)[4]
            put(w, out.at[part], weighted.at[at], height)
            sums[part, 0] = m * jnp.float32(1 / LOG2E)
            sums[part, 1] = u
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(sums.at[part], numbers.at[at])
            gpu.wait_smem_to_gmem(0)

        def fresh(*carry):
            return tuple(jnp.full_like(x, e) for x, e in zip(carry, (LOWEST, 0, 0), strict=True))

        def step(n, carry):
            turn, *state = carry
            row, starts = (step_of(worker, n)[i] for i in (1, 5))
            begins = starts & (n > 0)

            @pl.when(begins)
            def _():
                leave(n - 1, *state)
                release(q_freed.at[2 * part + lax.rem(turn, jnp.int32(2))], device.interpret)

            m, u, w = lax.cond(begins, fresh, lambda *x: x, *state)
            turn = turn + begins.astype(jnp.int32)
            q_slot = lax.rem(turn, jnp.int32(2))
            pl.when(starts)(lambda: gpu.barrier_wait(q_filled.at[2 * part + q_slot]))
            slot = lax.rem(n, jnp.int32(stages))
            gpu.barrier_wait(filled.at[stages * part + slot])
            values = v_ring.at[part, slot]
            s = scores(device, q_ring.at[part, q_slot], k_ring.at[part, slot], values)
            clean(values)
            held = across(i_ring[part, slot], s)
            s = jnp.where((interval[row, 0] <= held) & (held <= interval[row, 1]), s, -jnp.inf)
            top = jnp.maximum(m, jnp.max(s, axis=1) * factor)
            p = jnp.exp2(s * factor - down(top, s))
            fade = jnp.exp2(m - top)
            (w,) = add(device, [w * down(fade, w)], [(p, values)])
            release(freed.at[stages * part + slot])
            return turn, top, fade * u + jnp.sum(p, axis=1), w

        zero = jnp.full((ROWS,), 0, jnp.float32)
        w = jnp.full((ROWS, weighted.shape[2]), 0, jnp.float32)
        turn, *state = lax.fori_loop(0, count, step, (jnp.int32(0), *fresh(zero, zero, w)))

        @pl.when(count > 0)
        def _():
            leave(count - 1, *state)
            release(q_freed.at[2 * part + lax.rem(turn, jnp.int32(2))], device.interpret)

    def fill():
        gpu.set_max_registers(SMALL, action="decrease")
        lengths = [counts[program * parts + part] for part in range(parts)]

        def step(n, turns):
            return tuple(one(n, part, turns[part]) for part in range(parts))

        def one(n, part, turn):
            worker, slot = program * parts + part, lax.rem(n, jnp.int32(stages))
            here = n < lengths[part]
            at = jnp.where(here, n, 0)
            output, row, group, tile, _, starts = step_of(worker, at)
            starts = starts & here
            q_slot = lax.rem(turn, jnp.int32(2))

            @pl.when(starts)
            def _():
                pl.when(turn >= 2)(lambda: gpu.barrier_wait(q_freed.at[2 * part + q_slot]))
                to = q_ring.at[part, q_slot]
                gpu.copy_gmem_to_smem(q.at[output], to, q_filled.at[2 * part + q_slot])

            @pl.when(here)
            def _():
                pl.when(n >= stages)(lambda: gpu.barrier_wait(freed.at[stages * part + slot]))
                tokens, ready = pl.ds(tile * TILE, TILE), filled.at[stages * part + slot]
                gpu.copy_gmem_to_smem(k.at[row, group, tokens], k_ring.at[part, slot], ready)
                gpu.copy_gmem_to_smem(index.at[row, tokens], i_ring.at[part, slot], ready)
                gpu.copy_gmem_to_smem(v.at[row, group, tokens], v_ring.at[part, slot], ready)

            return turn + starts.astype(jnp.int32)

        most = lengths[0]
        for length in lengths[1:]:
            most = jnp.maximum(most, length)
        turns = lax.fori_loop(0, most, step, (jnp.int32(0),) * parts)
        for part in range(parts):  # what was filled last is still to be freed
            for used, ring, slots in ((turns, q_freed, 2), (lengths, freed, stages)):
                for slot in range(slots):
                    last = ring.at[slots * part + slot]
                    pl.when(used[part] > slot)(lambda last=last: gpu.barrier_wait(last))

    pl.when(warps < parts)(lambda: consume(warps))
    pl.when(warps == 2)(fill)


def workers(K, V):
    """How many a program has, and of how many tiles their rings are."""
    for parts in (2, 1):
        stages = (ROOM // parts - 4 * ROWS * K) // (2 * TILE * (K + V))
        if stages > 1:
            break
    return parts, stages


def attention(device, scale, dtype, q, k, v, first, last, kv_index):
    """y (B, 1, H, V) and lse (B, 1, H) of queries (B, 1, H, K)."""
    (batch, _, heads, K), (source, groups), V = q.shape, k.shape[1:3], v.shape[3]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as a cache lies
    ratio, (parts, stages) = heads // groups, workers(K, V)
    height = -(-ratio // 8) * 8
    index = tiles.cut(kv_index, TILE, -1)
    low, high = tiles.spans(tiles.extent(index), first.T, last.T)
    low, high = (jnp.repeat(x[:, 0], groups) for x in (low, high))
    programs, most = CORES.get(device.kind, 132), index.shape[0]
    plan = decode.partition(low, high, programs * parts, most)
    slots = plan.used.shape[0]

    def whole(x):  # a cache is a multiple of 64 long, or is copied
        return jnp.pad(x, [(0, 0), (0, 0), (0, -source % TILE), (0, 0)])

    rows = rearrange(q, "b 1 (g r) k -> (b g) r k", g=groups)
    rows = jnp.pad(rows, [(0, 0), (0, ROWS - ratio), (0, 0)])
    scratch = [
        hopper.tiles(parts, 2, ROWS, K),
        hopper.tiles(parts, stages, TILE, K),
        hopper.tiles(parts, stages, TILE, V),
        gpu.SMEM((parts, stages, TILE), jnp.int32),
        stage(jnp.float32),
        gpu.SMEM((parts, 2, ROWS), jnp.float32),
        *(gpu.Barrier(num_barriers=2 * parts) for _ in range(2)),
        gpu.Barrier(num_arrivals=3, num_barriers=stages * parts),
        gpu.Barrier(num_barriers=stages * parts),
    ]
    run = call(
        partial(_kernel, device, scale * LOG2E, groups, (parts, stages, height)),
        device,
        (programs,),
        ("program",),
        [shape(slots, 2, ROWS), shape(slots, height, V)],
        scratch,
    )
    tables = (x.astype(jnp.int32) for x in (plan.output, plan.tile, plan.slot, plan.starts))
    numbers, w = run(
        rows,
        whole(k),
        whole(v),
        rearrange(index, "n b s -> b (n s)"),
        jnp.stack([jnp.maximum(first[:, 0], 0), last[:, 0]], axis=1),
        plan.live.sum(axis=1, dtype=jnp.int32),
        jnp.stack(list(tables), axis=-1),
    )
    partials = numbers[:, 0, :ratio], numbers[:, 1, :ratio], w[:, :ratio]
    m, u, w = decode.merge(plan, partials)
    y = jnp.where(u[..., None] == 0, 0, w / u[..., None])
    y, lse = (x.reshape(batch, 1, heads, *x.shape[2:]) for x in (y, m + jnp.log(u)))
    return y.astype(dtype), lse
