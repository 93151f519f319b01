"""The kernels of `pallas_gpu.py`: a walk along the chunks, and gradients of each chunk by itself.

Arrays are (B, T, heads, features) as the caller has them, chunks of them (B, N, H, ...). `rows`
(B, N, H, R, C) holds, for each token, how much it reads of the state before its chunk and how much
it gives to the state after it; then, if the scores are computed here, its decay since the chunk's
start as a sum of two floats, and the first and last place of its document in the chunk. Scores that
come given are decayed already, and so are their queries and keys: then the first two rows are 1 or
0, in the document or not.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from .. import hopper
from ..hopper import TILE, Warpgroup, tiles

CHUNK = TILE
READ, GIVE, HIGH, LOW, FIRST, LAST = range(6)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def slices(size):
    """The parts of an axis that a tile spans."""
    return [pl.ds(begin, TILE) for begin in range(0, size, TILE)]


def times(factor, x):
    """factor * x, and zero where the factor is zero, whatever x is."""
    return jnp.where(factor > 0, factor * x, jnp.float32(0))


def weights(warps, rows, reverse):
    """(decay between row and column, whether the row sees the column), C x C.

    A row sees itself and what comes before it in its document, in `reverse` what comes after.
    """
    i, j = (warps.index((CHUNK, CHUNK), axis).astype(jnp.float32) for axis in (0, 1))
    limit = warps.down(rows.at[LAST if reverse else FIRST])
    seen = (i <= j) & (j <= limit) if reverse else (i >= j) & (j >= limit)
    high = warps.down(rows.at[HIGH]) - warps.across(rows.at[HIGH])
    low = warps.down(rows.at[LOW]) - warps.across(rows.at[LOW])
    between = -(high + low) if reverse else high + low
    return jnp.exp(jnp.where(seen, between, jnp.float32(0))), seen


def walk(device, q, k, v, rows, whole, state, scores=None, *, reverse=False, keep=False):
    """y = scores v + read (q S), then S = whole S + k^T (give v), from the first chunk to the last.

    In `reverse` from the last to the first, with what is read and given exchanged and the scores
    transposed: q, k, v being k, q, dy it makes dv and the gradient of S.
    Returns y, the last S, and if `keep` the S that each chunk began with, in bfloat16.

    A program takes one row, one head and 64 values. S stays in its registers; the tiles of the
    chunk after the next are copied while this one and the next are computed.
    """
    batch, heads, width, _ = state.shape
    chunks = v.shape[1] // CHUNK
    read, give = (GIVE, READ) if reverse else (READ, GIVE)
    given = scores is not None
    inputs = [q, k, v, rows, whole, *([scores] if given else []), state]
    ratio_q, ratio_k, ratio_v = (heads // x.shape[2] for x in (q, k, v))
    parts = slices(width)

    def kernel(*refs):
        *sources, initial = refs[: len(inputs)]
        y, final, *kept = refs[len(inputs) : len(inputs) + 2 + keep]
        *slots, before, out, ready = refs[len(inputs) + 2 + keep :]
        row, head, part = (jax.lax.axis_index(name) for name in ("row", "head", "values"))
        values = pl.ds(part * TILE, TILE)
        warps = Warpgroup(device)

        def place(n):
            return chunks - 1 - n if reverse else n

        def tokens(n, head, ratio, *rest):
            return row, pl.ds(place(n) * CHUNK, CHUNK), jax.lax.div(head, jnp.int32(ratio)), *rest

        def fetch(n, slot):
            chunk = row, place(n), head
            where = (
                tokens(n, head, ratio_q),
                tokens(n, head, ratio_k),
                tokens(n, head, ratio_v, values),
                *([chunk] * (len(sources) - 3)),
            )
            for source, at, buffer in zip(sources, where, slots, strict=True):
                gpu.copy_gmem_to_smem(source.at[at], buffer.at[slot], ready.at[slot])

        def passed(whole, k, v, where, block):
            after = times(warps.down(whole.at[where]), block)
            after += warps.dot("jk,jv->kv", k.at[:, where], v)
            return jax.lax.optimization_barrier(after)  # one block at a time: fewer registers

        def step(n, S):
            slot = jax.lax.rem(n, jnp.int32(2))
            gpu.barrier_wait(ready.at[slot])
            q, k, v, rows, whole, *scores = (buffer.at[slot] for buffer in slots)
            gpu.wait_smem_to_gmem(0, wait_read_only=True)  # `before` and `out` have left
            if not given:
                scores = [out]
                weight, seen = weights(warps, rows, reverse)
                inside = warps.dot("ik,jk->ij", q, k) * weight
                out[...] = jnp.where(seen, inside, jnp.float32(0)).astype(jnp.bfloat16)
            for where, block in zip(parts, S, strict=True):
                before.at[where][...] = block.astype(jnp.bfloat16)
            gpu.commit_smem()
            if keep:
                states = kept[0].at[row, place(n), head, :, values]
                gpu.copy_smem_to_gmem(before, states)
            reading = times(warps.down(rows.at[read]), warps.dot("ik,kv->iv", q, before))
            within = "ji,jv->iv" if given and reverse else "ij,jv->iv"
            reading += warps.dot(within, scores[0], v)
            out[...] = reading.astype(jnp.bfloat16)
            if not given:
                giving = times(warps.down(rows.at[give]), warps.tile(v))
                v[...] = giving.astype(jnp.bfloat16)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(out, y.at[tokens(n, head, 1, values)])
            S = tuple(
                passed(whole, k, v, where, block) for where, block in zip(parts, S, strict=True)
            )

            @pl.when(n + 2 < chunks)
            def _():
                gpu.commit_smem()  # what was read here by threads is written by copies
                fetch(n + 2, slot)

            return S

        for n in range(min(2, chunks)):
            fetch(n, n)
        S = tuple(warps.from_global(initial.at[row, head, where, values]) for where in parts)
        S = jax.lax.fori_loop(0, chunks, step, S)
        for where, block in zip(parts, S, strict=True):
            final.at[row, head, where, values][...] = block
        gpu.wait_smem_to_gmem(0)

    outputs = [
        shape(batch, v.shape[1], heads, v.shape[3]),
        shape(*state.shape, dtype=jnp.float32),
        *([shape(batch, chunks, *state.shape[1:])] if keep else []),
    ]
    scratch = [
        tiles(2, CHUNK, width),
        tiles(2, CHUNK, width),
        tiles(2, CHUNK, TILE),
        gpu.SMEM((2, *rows.shape[3:]), jnp.float32),
        gpu.SMEM((2, width), jnp.float32),
        *([tiles(2, CHUNK, CHUNK)] if given else []),
    ]
    ready = gpu.Barrier(num_arrivals=len(scratch), num_barriers=2)
    scratch += [tiles(width, TILE), tiles(CHUNK, TILE), ready]
    run = hopper.call(
        kernel,
        device,
        out_type=outputs,
        scratch_types=scratch,
        grid=(batch, heads, v.shape[3] // TILE),
        grid_names=("row", "head", "values"),
    )
    return run(*inputs)


def gradients(device, q, k, v, dy, rows, before, after, *, given):
    """What the queries, the keys and the decays of every chunk get, from the states around it.

    `before` is S where the chunk begins, `after` the gradient of S where it ends, (B, N, H, K, V).
    Returns (of q, of k, through, inside). through (B, N, H, K) sums S dS over the values. If the
    scores came `given`, q and k get what comes by way of the states, and inside is the gradient of
    the scores. Else q and k get all, and inside (B, N, H, 4, C) holds the four sums that the decay
    needs: what each token reads and gives inside the chunk, reads of the state and gives to it.

    A program takes one chunk of one row and head, and of the states 64 keys at a time.
    """
    batch, chunks, heads, width, values = before.shape
    inputs = [q, k, v, dy, rows, before, after]
    ratios = [heads // x.shape[2] for x in (q, k, v, dy)]

    def kernel(*refs):
        sources, (dq, dk, through, inside), scratch = refs[:7], refs[7:11], refs[11:]
        *slots, inner, ready, loaded = scratch
        q, k, v, dy, rows, S, dS = slots
        row, n, head = (jax.lax.axis_index(name) for name in ("row", "chunk", "head"))
        tokens, chunk = pl.ds(n * CHUNK, CHUNK), (row, n, head)
        warps = Warpgroup(device)

        def fetch(where):
            for source, buffer in zip(sources[5:], (S, dS), strict=True):
                gpu.copy_gmem_to_smem(source.at[*chunk, where], buffer, loaded)

        needed = zip(sources[:4], slots[:4], ratios, strict=True)
        for source, buffer, ratio in list(needed)[2 * given :]:  # given scores need no q and k
            at = row, tokens, jax.lax.div(head, jnp.int32(ratio))
            gpu.copy_gmem_to_smem(source.at[at], buffer, ready)
        gpu.copy_gmem_to_smem(sources[4].at[chunk], rows, ready)
        fetch(slices(width)[0])
        gpu.barrier_wait(ready)

        d_scores = warps.dot("iv,jv->ij", dy, v)
        if not given:
            weight, seen = weights(warps, rows, reverse=False)
            d_scores = jnp.where(seen, d_scores * weight, jnp.float32(0))
            i, j = (warps.index((CHUNK, CHUNK), axis) for axis in (0, 1))
            pairs = d_scores * warps.dot("ik,jk->ij", q, k)
            pairs = jnp.where(seen & (i != j), pairs, jnp.float32(0))
            inside.at[*chunk, 0][...] = jnp.sum(pairs, axis=1)
            inside.at[*chunk, 1][...] = jnp.sum(pairs, axis=0)
        inner[...] = d_scores.astype(jnp.bfloat16)
        gpu.commit_smem()
        if given:
            gpu.copy_smem_to_gmem(inner, inside.at[chunk])

        at_start = at_end = None
        for number, where in enumerate(slices(width)):
            gpu.barrier_wait(loaded)
            passing = sum(
                jnp.sum(warps.tile(S.at[:, part]) * warps.tile(dS.at[:, part]), axis=1)
                for part in slices(values)
            )
            through.at[*chunk, where][...] = passing
            q_part, k_part = q.at[:, where], k.at[:, where]
            of_q = times(warps.down(rows.at[READ]), warps.dot("iv,kv->ik", dy, S))
            of_k = times(warps.down(rows.at[GIVE]), warps.dot("jv,kv->jk", v, dS))
            if number + 1 < len(slices(width)):
                gpu.commit_smem()
                fetch(slices(width)[number + 1])
            if not given:
                reads = jnp.sum(warps.tile(q_part) * of_q, axis=1)
                gives = jnp.sum(warps.tile(k_part) * of_k, axis=1)
                at_start = reads if at_start is None else at_start + reads
                at_end = gives if at_end is None else at_end + gives
                of_q += warps.dot("ij,jk->ik", inner, k_part)
                of_k += warps.dot("ij,ik->jk", inner, q_part)
            q_part[...] = of_q.astype(jnp.bfloat16)  # these keys are read no more
            k_part[...] = of_k.astype(jnp.bfloat16)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(q, dq.at[row, tokens, head])
        gpu.copy_smem_to_gmem(k, dk.at[row, tokens, head])
        if not given:
            inside.at[*chunk, 2][...] = at_start
            inside.at[*chunk, 3][...] = at_end
        gpu.wait_smem_to_gmem(0)

    whole = batch, chunks, heads
    tokens = batch, chunks * CHUNK, heads, width
    outputs = [
        shape(*tokens),
        shape(*tokens),
        shape(*whole, width, dtype=jnp.float32),
        shape(*whole, CHUNK, CHUNK) if given else shape(*whole, 4, CHUNK, dtype=jnp.float32),
    ]
    scratch = [
        tiles(CHUNK, width),
        tiles(CHUNK, width),
        tiles(CHUNK, values),
        tiles(CHUNK, values),
        gpu.SMEM(rows.shape[3:], jnp.float32),
        tiles(TILE, values),
        tiles(TILE, values),
        tiles(CHUNK, CHUNK),
        gpu.Barrier(num_arrivals=3 if given else 5),
        gpu.Barrier(num_arrivals=2),
    ]
    run = hopper.call(
        kernel,
        device,
        out_type=outputs,
        scratch_types=scratch,
        grid=(batch, chunks, heads),
        grid_names=("row", "chunk", "head"),
    )
    return run(*inputs)
