"""The kernels of `pallas_gpu.py`: two warpgroups read a ring of tiles that a third one fills.

Arrays are (B, T, heads, features) as the caller has them, padded to whole tiles. `interval`
(B, 2, T) is the first and the last index that each query sees, `index` (B, S) that of each key.
`ranges` (B, tiles, 4) holds, for each tile of the side that a program owns, the range of tiles of
the other side that it meets and two numbers to compare with the other side's `ends` (B, tiles, 2):
the greatest first and the least last of a tile of queries, the least and the greatest index of a
tile of keys. Where they say that every query sees every key, no score is masked.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from ..hopper import tiles
from ..monoid import LOWEST
from .pallas_gpu_tiles import (
    LARGE,
    LOG2E,
    OWN,
    ROWS,
    STAGES,
    across,
    add,
    call,
    divide,
    down,
    fill,
    hide,
    products,
    put,
    release,
    ring,
    shape,
    stage,
)


def forward(device, scale, dtype, q, k, v, interval, index, ranges, ends):
    """y (B, T, H, V) in `dtype` and lse (B, H, T); k holds bad rows as nan and v as zeros.

    A program takes two tiles of queries of one head; its online softmax is in powers of two.
    """
    (batch, time, heads, K), (_, _, groups, V) = q.shape, v.shape
    size = k.shape[1] // ends.shape[1]
    factor = scale * LOG2E

    def kernel(q, k, v, interval, index, ranges, ends, y, lse, *scratch):
        q_own, seen, k_ring, v_ring, i_ring, out, sums, loaded, *barriers = scratch
        k_filled, k_freed, v_filled, v_freed = barriers
        row, head = divide(lax.axis_index("head"), heads)
        own = ranges.shape[1] - 1 - lax.axis_index("tile")  # under a causal mask the longest first
        warps = lax.axis_index("warpgroup")
        low, high, first, last = (ranges[row, own, n] for n in range(4))

        @pl.when(warps < 2)
        def _():
            gpu.set_max_registers(LARGE, action="increase")
            tokens = pl.ds(own * OWN + warps * ROWS, ROWS)
            gpu.barrier_wait(loaded)
            sees_first, sees_last = seen[warps, 0], seen[warps, 1]

            def step(n, carry):
                m, u, w = carry
                slot = lax.rem(n, jnp.int32(STAGES))
                least, greatest = (ends[row, low + n, side] for side in (0, 1))
                gpu.barrier_wait(k_filled.at[slot])
                (s,) = products(device, (q_own.at[warps], k_ring.at[slot]))

                def mask(s):
                    index = across(i_ring[slot], s)
                    see = (down(sees_first, s) <= index) & (index <= down(sees_last, s))
                    return jnp.where(see, s, -jnp.inf)

                whole = (first <= least) & (greatest <= last)
                s = lax.cond(whole, lambda s: s, mask, s)
                release(k_freed.at[slot])
                top = jnp.maximum(m, jnp.max(s, axis=1) * factor)
                p = jnp.exp2(s * factor - down(top, s))
                fade = jnp.exp2(m - top)
                u = fade * u + jnp.sum(p, axis=1)
                gpu.barrier_wait(v_filled.at[slot])
                (w,) = add(device, [w * down(fade, w)], [(p, v_ring.at[slot])])
                release(v_freed.at[slot], device.interpret)
                return top, u, w

            m, zero = (jnp.full((ROWS,), x, jnp.float32) for x in (LOWEST, 0))
            w = jnp.full((ROWS, V), 0, jnp.float32)
            m, u, w = lax.fori_loop(0, high - low, step, (m, zero, w))
            w /= down(jnp.where(u == 0, jnp.float32(1), u), w)
            put(w, out.at[warps], y.at[row, tokens, head])
            sums[warps] = m * jnp.float32(1 / LOG2E) + jnp.log(u)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(sums.at[warps], lse.at[row, head, tokens])
            gpu.wait_smem_to_gmem(0)

        @pl.when(warps == 2)
        def _():
            group = lax.div(head, jnp.int32(heads // groups))

            def of_k(n):
                tokens = pl.ds((low + n) * size, size)
                return (k.at[row, tokens, group], k_ring), (index.at[row, tokens], i_ring)

            def of_v(n):
                return ((v.at[row, pl.ds((low + n) * size, size), group], v_ring),)

            owned = []
            for part in range(2):
                tokens = pl.ds(own * OWN + part * ROWS, ROWS)
                owned += ((q.at[row, tokens, head], q_own.at[part]),)
                owned += ((interval.at[row, :, tokens], seen.at[part]),)
            fill(owned, loaded, high - low, (of_k, k_filled, k_freed), (of_v, v_filled, v_freed))

    scratch = [
        tiles(2, ROWS, K),
        gpu.SMEM((2, 2, ROWS), jnp.int32),
        tiles(STAGES, size, K),
        tiles(STAGES, size, V),
        gpu.SMEM((STAGES, size), jnp.int32),
        stage(dtype),
        gpu.SMEM((2, ROWS), jnp.float32),
        gpu.Barrier(num_arrivals=4),
        *ring(2),
        *ring(1),
    ]
    outputs = shape(batch, time, heads, V, dtype=dtype), shape(batch, heads, time)
    grid = (batch * heads, time // OWN)
    run = call(kernel, device, grid, ("head", "tile"), outputs, scratch)
    return run(q, k, v, interval, index, ranges, ends)


def rows(device, scale, dtype, q, k, v, dy, numbers, interval, index, ranges, ends):
    """dq (B, T, H, K) in `dtype`; q, k and dy hold bad rows as zeros, v as nan.

    `numbers` (B, H, 2, T) is lse in powers of two, nan for a bad query, and delta. A program takes
    two tiles of queries of one head.
    """
    (batch, time, heads, K), (_, _, groups, V) = q.shape, v.shape
    size = k.shape[1] // ends.shape[1]
    factor, line = scale * LOG2E, min(size, 64)

    def kernel(q, k, v, dy, numbers, interval, index, ranges, ends, dq, *scratch):
        q_own, dy_own, given, seen, k_ring, v_ring, i_ring, out, loaded, *barriers = scratch
        k_filled, k_freed, v_filled, v_freed = barriers
        row, head = divide(lax.axis_index("head"), heads)
        own = ranges.shape[1] - 1 - lax.axis_index("tile")
        warps = lax.axis_index("warpgroup")
        low, high, first, last = (ranges[row, own, n] for n in range(4))

        @pl.when(warps < 2)
        def _():
            gpu.set_max_registers(LARGE, action="increase")
            tokens = pl.ds(own * OWN + warps * ROWS, ROWS)
            gpu.barrier_wait(loaded)
            lse, delta = given[warps, 0], given[warps, 1]
            sees_first, sees_last = seen[warps, 0], seen[warps, 1]

            def step(n, total):
                slot = lax.rem(n, jnp.int32(STAGES))
                least, greatest = (ends[row, low + n, side] for side in (0, 1))
                gpu.barrier_wait(v_filled.at[slot])
                gpu.barrier_wait(k_filled.at[slot])
                pairs = (q_own.at[warps], k_ring.at[slot]), (dy_own.at[warps], v_ring.at[slot])
                s, dp = products(device, *pairs)
                release(v_freed.at[slot], device.interpret)

                def see():
                    index = across(i_ring[slot], s)
                    return (down(sees_first, s) <= index) & (index <= down(sees_last, s))

                p = jnp.exp2(s * factor - down(lse, s))
                ds = p * (dp - down(delta, s))
                (ds,) = hide((first <= least) & (greatest <= last), see, (ds,))
                (total,) = add(device, [total], [(ds, k_ring.at[slot])])
                release(k_freed.at[slot])
                return total

            total = lax.fori_loop(0, high - low, step, jnp.full((ROWS, K), 0, jnp.float32))
            put(total * scale, out.at[warps], dq.at[row, tokens, head])
            gpu.wait_smem_to_gmem(0)

        @pl.when(warps == 2)
        def _():
            group = lax.div(head, jnp.int32(heads // groups))

            def of_k(n):
                tokens = pl.ds((low + n) * size, size)
                return (k.at[row, tokens, group], k_ring), (index.at[row, tokens], i_ring)

            def of_v(n):
                return ((v.at[row, pl.ds((low + n) * size, size), group], v_ring),)

            owned = []
            for part in range(2):
                tokens = pl.ds(own * OWN + part * ROWS, ROWS)
                owned += ((q.at[row, tokens, head], q_own.at[part]),)
                owned += ((dy.at[row, tokens, head], dy_own.at[part]),)
                owned += ((numbers.at[row, head, :, tokens], given.at[part]),)
                owned += ((interval.at[row, :, tokens], seen.at[part]),)
            fill(owned, loaded, high - low, (of_v, v_filled, v_freed), (of_k, k_filled, k_freed))

    scratch = [
        tiles(2, ROWS, K, line=line),
        tiles(2, ROWS, V, line=line),
        gpu.SMEM((2, 2, ROWS), jnp.float32),
        gpu.SMEM((2, 2, ROWS), jnp.int32),
        tiles(STAGES, size, K, line=line),
        tiles(STAGES, size, V, line=line),
        gpu.SMEM((STAGES, size), jnp.int32),
        stage(dtype),
        gpu.Barrier(num_arrivals=8),
        *ring(2),
        *ring(1),
    ]
    grid = (batch * heads, time // OWN)
    (dq,) = call(
        kernel, device, grid, ("head", "tile"), [shape(batch, time, heads, K, dtype=dtype)], scratch
    )(q, k, v, dy, numbers, interval, index, ranges, ends)
    return dq


def columns(device, scale, dtype, q, k, v, dy, numbers, interval, index, ranges, ends):
    """dk (B, S, G, K) and dv (B, S, G, V) in `dtype`; k and v hold bad rows as nan, q and dy zeros.

    A program takes the keys of one tile and all heads that read them, one after the other. A
    warpgroup has registers for 64 keys of K + V <= 256 numbers: of wider keys the first makes dv
    and the second dk, each with scores of its own.
    """
    (batch, time, heads, K), (_, source, groups, V) = q.shape, v.shape
    size, width = time // ends.shape[1], source // ranges.shape[1]
    factor, ratio, parts = scale * LOG2E, heads // groups, width // ROWS

    def kernel(q, k, v, dy, numbers, interval, index, ranges, ends, dk, dv, *scratch):
        k_own, v_own, i_own, q_ring, dy_ring, given, seen, out, loaded, filled, freed = scratch
        row, group = divide(lax.axis_index("group"), groups)
        own, warps = lax.axis_index("tile"), lax.axis_index("warpgroup")
        low, high, least, greatest = (ranges[row, own, n] for n in range(4))
        count = high - low

        def place(n):
            """The n-th tile of queries, and of which head."""
            return group * ratio + lax.div(n, count), low + lax.rem(n, count)

        def consume(part, of_k, of_v):
            gpu.set_max_registers(LARGE, action="increase")
            tokens = pl.ds(own * width + part * ROWS, ROWS)
            gpu.barrier_wait(loaded)
            keys = i_own[part]

            def step(n, totals):
                slot = lax.rem(n, jnp.int32(STAGES))
                first, last = (ends[row, place(n)[1], side] for side in (0, 1))
                gpu.barrier_wait(filled.at[slot])
                pairs = [(k_own.at[part], q_ring.at[slot]), (v_own.at[part], dy_ring.at[slot])]
                s, *dp = products(device, *pairs[: 1 + of_k])

                def see():
                    index = down(keys, s)
                    sees_first, sees_last = (across(seen[slot, side], s) for side in (0, 1))
                    return (sees_first <= index) & (index <= sees_last)

                p = jnp.exp2(s * factor - across(given[slot, 0], s))
                ds = [p * (x - across(given[slot, 1], s)) for x in dp]
                weights = hide((first <= least) & (greatest <= last), see, ds + [p] * of_v)
                rings = [q_ring] * of_k + [dy_ring] * of_v
                terms = [(x, ring.at[slot]) for x, ring in zip(weights, rings, strict=True)]
                totals = add(device, totals, terms)
                release(freed.at[slot])
                return totals

            widths = [K] * of_k + [V] * of_v
            totals = tuple(jnp.full((ROWS, n), 0, jnp.float32) for n in widths)
            totals = list(lax.fori_loop(0, count * ratio, step, totals))
            if of_k:
                put(totals.pop(0) * scale, out.at[warps], dk.at[row, tokens, group])
            if of_v:
                put(totals.pop(), out.at[warps], dv.at[row, tokens, group])
            gpu.wait_smem_to_gmem(0)

        if parts == 2:
            pl.when(warps < 2)(lambda: consume(warps, True, True))
        else:
            pl.when(warps == 0)(lambda: consume(0, False, True))
            pl.when(warps == 1)(lambda: consume(0, True, False))

        @pl.when(warps == 2)
        def _():
            def copies(n):
                head, at = place(n)
                tokens = pl.ds(at * size, size)
                return (
                    (q.at[row, tokens, head], q_ring),
                    (dy.at[row, tokens, head], dy_ring),
                    (numbers.at[row, head, :, tokens], given),
                    (interval.at[row, :, tokens], seen),
                )

            owned = []
            for part in range(parts):
                tokens = pl.ds(own * width + part * ROWS, ROWS)
                owned += ((k.at[row, tokens, group], k_own.at[part]),)
                owned += ((v.at[row, tokens, group], v_own.at[part]),)
                owned += ((index.at[row, tokens], i_own.at[part]),)
            fill(owned, loaded, count * ratio, (copies, filled, freed))

    scratch = [
        tiles(parts, ROWS, K),
        tiles(parts, ROWS, V),
        gpu.SMEM((parts, ROWS), jnp.int32),
        tiles(STAGES, size, K),
        tiles(STAGES, size, V),
        gpu.SMEM((STAGES, 2, size), jnp.float32),
        gpu.SMEM((STAGES, 2, size), jnp.int32),
        stage(dtype),
        gpu.Barrier(num_arrivals=3 * parts),
        *ring(4),
    ]
    outputs = [shape(batch, source, groups, n, dtype=dtype) for n in (K, V)]
    grid = (batch * groups, source // width)
    run = call(kernel, device, grid, ("group", "tile"), outputs, scratch)
    return run(q, k, v, dy, numbers, interval, index, ranges, ends)
