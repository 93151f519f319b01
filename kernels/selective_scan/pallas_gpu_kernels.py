"""The kernels of `pallas_gpu.py`: tokens one after another, a channel's states in one thread.

u, delta and y are (B, T, D), B and C (B, T, N), states (B, D, N) in float32; A comes with log2(e)
in it, so that exp2(delta A) is a decay; `begins` (B, T / C, 32) says which of a chunk's tokens
begin a document. A program takes one row and 128 channels, a thread each; the tiles of the next
chunk are copied while this one is computed.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from .. import hopper, pallas

CHANNELS = 128  # threads of a warpgroup
LN2 = math.log(2)
VECTOR, ROWS = 4, 64  # ROWS of a product of the tensor cores
UNROLL = 4
LAYOUT = gpu.Layout.TCGEN05_TMEM_NATIVE(VECTOR)  # of (CHANNELS, N): a row a thread


def call(kernel, device, **how):
    """`gpu.kernel` compiled, or interpreted where the target says so.

    No barriers are put around what the threads load and store: what one of them writes to shared
    memory is read by itself, or between two commits by copies and by the tensor cores.
    """
    how["compiler_params"] = gpu.CompilerParams(
        approx_math=True,
        lowering_semantics=gpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=True,
    )
    launch = gpu.kernel(kernel, interpret=device.interpret, grid_names=("row", "channels"), **how)

    def run(*args):
        with jax.enable_x64(False):
            return launch(*args)

    return run


class Threads:
    """Arrays as the threads hold them; for the interpreter, which has no layouts, as they are."""

    def __init__(self, device, states):
        self.interpreted, self.states = bool(device.interpret), states

    def _as(self, layout, x):
        return x if self.interpreted else gpu.layout_cast(x, layout)

    def from_global(self, ref):
        """(CHANNELS,) or (CHANNELS, N) in global memory."""
        if self.interpreted:
            return ref[...]
        layout = LAYOUT if len(ref.shape) == 2 else LAYOUT.reduce(1)
        return hopper.load(ref, layout)

    def to_global(self, ref, x):
        """(CHANNELS, N) to global memory."""
        store = getattr(gpu, "store", None)  # since JAX 0.11
        if self.interpreted or store is None:
            ref[...] = x
        else:
            store(ref, x, optimized=False)

    def tile(self, ref):
        """(CHANNELS, N) in shared memory."""
        return self._as(LAYOUT, ref[...])

    def zeros(self, axis=None):
        """(CHANNELS, N), or (CHANNELS,) without its axis 1."""
        if axis is None:
            return self._as(LAYOUT, jnp.zeros((CHANNELS, self.states), jnp.float32))
        return self._as(LAYOUT.reduce(axis), jnp.zeros(CHANNELS, jnp.float32))

    def channels(self, ref):
        """(CHANNELS,) in float32."""
        return self._as(LAYOUT.reduce(1), ref[...]).astype(jnp.float32)

    def down(self, x):
        """(CHANNELS,) -> (CHANNELS, N)."""
        shape = (CHANNELS, self.states)
        return self._as(LAYOUT, jax.lax.broadcast_in_dim(x, shape, (0,)))

    def across(self, ref):
        """(N,) -> (CHANNELS, N) in float32."""
        x = self._as(LAYOUT.reduce(0), ref[...]).astype(jnp.float32)
        return self._as(LAYOUT, jax.lax.broadcast_in_dim(x, (CHANNELS, self.states), (1,)))


class OverChannels:
    """Sums over the channels, of some tokens at a time, as a product with ones by the tensor cores.

    What is summed is rounded to bfloat16. Shuffles between threads would be five steps a number.
    """

    def __init__(self, device, states, products, ones):
        self.interpreted, self.states = bool(device.interpret), states
        self.products, self.ones = products, ones
        value = jnp.full(ones.shape, 1 / states, jnp.bfloat16)
        ones[...] = value if self.interpreted else gpu.layout_cast(value, gpu.Layout.WGMMA)

    @staticmethod
    def scratch(states):
        """Shared memory for the products (channels, tokens states), and the ones."""
        swizzled = gpu.TilingTransform((8, states)), gpu.SwizzleTransform(2 * states)
        widths = ROWS, states
        return [gpu.SMEM((CHANNELS, n), jnp.bfloat16, transforms=swizzled) for n in widths]

    def give(self, j, x):
        """Token j's (CHANNELS, N)."""
        where = pl.ds(j * self.states, self.states)
        self.products.at[:, where][...] = x.astype(jnp.bfloat16)

    def sums(self, ref):
        """Into (ROWS,): the tokens' sums, one token's states after the other's."""
        gpu.commit_smem()
        if self.interpreted:
            total = pallas.dot(self.products[...], self.ones[...], "km,kn->mn", exact=False)
        else:
            total = pl.run_scoped(self._product, hopper.ACC((ROWS, self.states), jnp.float32))
        ref[...] = jnp.sum(total, axis=1)
        gpu.commit_smem()  # all threads: the products may be written again

    def _product(self, total):
        gpu.wgmma(total, self.products.transpose((1, 0)), self.ones)
        return total[...]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def slots(size, inputs):
    """Two buffers for a chunk of each input (B, T, D or N), and of `begins`, and their barriers."""

    def buffer(x):
        if x.dtype == jnp.int32:
            return gpu.SMEM((2, x.shape[2]), x.dtype)
        return gpu.SMEM((2, size, min(x.shape[2], CHANNELS)), x.dtype)

    return [buffer(x) for x in inputs], gpu.Barrier(num_arrivals=len(inputs), num_barriers=2)


def fetcher(size, sources, tiles, ready):
    """The function that starts to copy chunk n of this program into a slot."""
    row, block = jax.lax.axis_index("row"), jax.lax.axis_index("channels")

    def fetch(n, slot):
        for source, tile in zip(sources, tiles, strict=True):
            at = row, (n if source.dtype == jnp.int32 else pl.ds(n * size, size))
            if source.shape[2] >= CHANNELS:
                at = *at, pl.ds(block * CHANNELS, CHANNELS)
            gpu.copy_gmem_to_smem(source.at[at], tile.at[slot], ready.at[slot])

    return fetch


def kept(begins, t, h):
    """The state, or its gradient, that crosses into token t."""
    return jnp.where(begins[0][t] != 0, jnp.float32(0), h) if begins else h


def forward(device, size, u, delta, A, B, C, D, state, begins=None, *, keep):
    """y, the last state, and if `keep` the state that each chunk began with (B, T / C, D, N)."""
    batch, time, width = u.shape
    states, chunks = A.shape[1], time // size
    inputs = [u, delta, B, C, *([] if begins is None else [begins])]

    def kernel(*refs):
        *sources, A, D, state, y, final = refs[: len(inputs) + 5]
        *starts, tiles, out, ready = refs[len(inputs) + 5 :]
        row, block = jax.lax.axis_index("row"), jax.lax.axis_index("channels")
        channels = pl.ds(block * CHANNELS, CHANNELS)
        threads, fetch = Threads(device, states), fetcher(size, sources, tiles, ready)
        A, D = threads.from_global(A.at[channels]), threads.from_global(D.at[channels])

        def chunk(n, h):
            slot = jax.lax.rem(n, jnp.int32(2))
            gpu.barrier_wait(ready.at[slot])
            u, delta, B, C, *begins = (tile.at[slot] for tile in tiles)

            @pl.when(n + 1 < chunks)
            def _():
                gpu.commit_smem()  # what threads have read is now written by copies
                fetch(n + 1, 1 - slot)

            if keep:
                threads.to_global(starts[0].at[row, n, channels], h)
            gpu.wait_smem_to_gmem(0, wait_read_only=True)  # `out` has left

            def group(i, h):  # loads before stores, so that tokens can overlap
                read = []
                for t in (i * UNROLL + j for j in range(UNROLL)):
                    u_, delta_ = threads.channels(u.at[t]), threads.channels(delta.at[t])
                    h = jnp.exp2(threads.down(delta_) * A) * kept(begins, t, h)
                    h += threads.down(delta_ * u_) * threads.across(B.at[t])
                    read.append(jnp.sum(h * threads.across(C.at[t]), axis=1) + D * u_)
                for j, y_ in enumerate(read):
                    out.at[i * UNROLL + j][...] = y_.astype(out.dtype)
                return h

            h = jax.lax.fori_loop(0, size // UNROLL, group, h)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(out, y.at[row, pl.ds(n * size, size), channels])
            return h

        fetch(0, 0)
        h = jax.lax.fori_loop(0, chunks, chunk, threads.from_global(state.at[row, channels]))
        threads.to_global(final.at[row, channels], h)
        gpu.wait_smem_to_gmem(0)

    outputs = [shape(*u.shape, dtype=u.dtype), shape(*state.shape)]
    outputs += [shape(batch, chunks, width, states)] if keep else []
    tiles, ready = slots(size, inputs)
    run = call(
        kernel,
        device,
        out_type=outputs,
        scratch_types=[tiles, gpu.SMEM((size, CHANNELS), u.dtype), ready],
        grid=(batch, width // CHANNELS),
    )
    return run(*inputs, A, D, state)


def backward(device, size, u, delta, A, B, C, D, starts, dy, d_final, begins=None):
    """Gradients of u, delta, A, B, C, D and the first state, from the last chunk to the first.

    Those of A and D come for each row, those of B and C (B, D / CHANNELS, T N) for each program.
    """
    batch, time, width = u.shape
    states, chunks = A.shape[1], time // size
    group = ROWS // states
    inputs = [u, delta, B, C, dy, *([] if begins is None else [begins])]

    def kernel(*refs):
        *sources, A, D, starts, d_final = refs[: len(inputs) + 4]
        du, d_delta, dA, dB, dC, dD, d_state = refs[len(inputs) + 4 : len(inputs) + 11]
        tiles, sums, before, (products, ones), ready = refs[len(inputs) + 11 :]
        row, block = jax.lax.axis_index("row"), jax.lax.axis_index("channels")
        channels = pl.ds(block * CHANNELS, CHANNELS)
        threads, fetch = Threads(device, states), fetcher(size, sources, tiles, ready)
        over = OverChannels(device, states, products, ones)
        A, D = threads.from_global(A.at[channels]), threads.from_global(D.at[channels])

        def chunk(i, carry):
            n, slot = chunks - 1 - i, jax.lax.rem(i, jnp.int32(2))
            gpu.barrier_wait(ready.at[slot])
            u, delta, B, C, dy, *begins = (tile.at[slot] for tile in tiles)

            gpu.wait_smem_to_gmem(0, wait_read_only=True)  # the gradients before have left

            @pl.when(n > 0)
            def _():
                gpu.commit_smem()
                fetch(n - 1, 1 - slot)

            h = threads.from_global(starts.at[row, n, channels])

            def again(i, h):
                for j in range(group):
                    t = i * group + j
                    u_, delta_, dy_ = (threads.channels(x.at[t]) for x in (u, delta, dy))
                    h = kept(begins, t, h)
                    before.at[t, :, pl.ds(0, states)][...] = h
                    h = jnp.exp2(threads.down(delta_) * A) * h
                    h += threads.down(delta_ * u_) * threads.across(B.at[t])
                    over.give(j, h * threads.down(dy_))
                over.sums(sums[1].at[pl.ds(i * ROWS, ROWS)])
                return h

            jax.lax.fori_loop(0, size // group, again, h)

            def back(i, carry):
                later, dA, dD = carry  # later: a_{t+1} lam_{t+1}
                i = size // group - 1 - i
                for j in reversed(range(group)):
                    t = i * group + j
                    u_, delta_, dy_ = (threads.channels(x.at[t]) for x in (u, delta, dy))
                    step = threads.down(delta_)
                    lam = later + threads.down(dy_) * threads.across(C.at[t])
                    earlier = jnp.exp2(step * A) * lam
                    d_log = earlier * threads.tile(before.at[t, :, pl.ds(0, states)])
                    over.give(j, lam * threads.down(delta_ * u_))
                    lam_B = jnp.sum(lam * threads.across(B.at[t]), axis=1)
                    of_log = jnp.sum(d_log * A, axis=1) * LN2
                    # a token's gradients take the place of its u and delta
                    u.at[t][...] = (delta_ * lam_B + D * dy_).astype(u.dtype)
                    delta.at[t][...] = (of_log + u_ * lam_B).astype(delta.dtype)
                    later, dA, dD = kept(begins, t, earlier), dA + d_log * step, dD + dy_ * u_
                over.sums(sums[0].at[pl.ds(i * ROWS, ROWS)])
                return later, dA, dD

            carry = jax.lax.fori_loop(0, size // group, back, carry)
            gpu.commit_smem()
            tokens, numbers = pl.ds(n * size, size), pl.ds(n * size * states, size * states)
            gpu.copy_smem_to_gmem(u, du.at[row, tokens, channels])
            gpu.copy_smem_to_gmem(delta, d_delta.at[row, tokens, channels])
            for part, whole in zip(sums, (dB, dC), strict=True):
                gpu.copy_smem_to_gmem(part, whole.at[row, block, numbers])
            return carry

        fetch(chunks - 1, 0)
        later = threads.from_global(d_final.at[row, channels])
        carry = later, threads.zeros(), threads.zeros(1)
        later, dA_, dD_ = jax.lax.fori_loop(0, chunks, chunk, carry)
        threads.to_global(d_state.at[row, channels], later)
        threads.to_global(dA.at[row, channels], dA_)
        threads.to_global(dD.at[row, channels], dD_)
        gpu.wait_smem_to_gmem(0)

    outputs = [
        shape(*u.shape, dtype=u.dtype),
        shape(*delta.shape, dtype=delta.dtype),
        shape(batch, width, states),
        shape(batch, width // CHANNELS, time * states),
        shape(batch, width // CHANNELS, time * states),
        shape(batch, width),
        shape(*d_final.shape),
    ]
    tiles, ready = slots(size, inputs)
    sums = [gpu.SMEM((size * states,), jnp.float32)] * 2
    # rows of a whole number of vectors, an odd one, are in different banks
    before = gpu.SMEM((size, CHANNELS, states + VECTOR), jnp.float32)
    run = call(
        kernel,
        device,
        out_type=outputs,
        scratch_types=[tiles, sums, before, OverChannels.scratch(states), ready],
        grid=(batch, width // CHANNELS),
    )
    return run(*inputs, A, D, starts, d_final)
