"""Chunkwise linear attention for TPUs: a grid step a chunk, the state in VMEM from step to step.

The maths is that of `xla.py`: tokens j < i part at one node of a binary tree over the chunk, and
the decay between them is exp of two sums of non-positive logs, so nothing overflows and nothing
cancels. The sums are made by rolls, a level from the one below. A scalar decay needs no tree: the
matrix of all segment sums of a chunk is a running sum down its rows.

Arrays are (B, heads, T, features), a token's numbers (B, heads, T / C, 1, C), states (V, K), where
decays of keys are a row. The backward runs the grid from the last chunk to the first; it makes the
decays again and reads the states that the forward kept, one a chunk.

Bytes a token and head in bfloat16, of K keys, V values and decays in float32: the forward reads
4 K + 2 V and the decays (4 K, or 4 of a scalar), and writes 2 V, the least there is; differentiated
it keeps 4 K V / C of states. The backward reads 4 K + 4 V, the decays and the states and writes
8 K + 4 V and the decays' gradient in float32; the least is 8 K + 6 V and twice the decays. XLA puts
the heads before time, which reads and writes everything once more. Operations of matrix units:
2 K C of a scalar decay's scores, 2 K C log2(C) of a vector's, 2 C V and 4 K V; in the backward
three times the scores', 4 C V and 8 K V.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import keep, pallas, tuned
from ..pallas import column, diagonal, index
from ..pallas import dot as product
from .xla import features

CHUNK, LEAST = 64, 8
NUMBERS = 1 << 14  # of a tile of larger chunks than that


def refuse(q, k, v, log_decay, state, reset, chunk):
    """Why not, or None."""
    del log_decay, reset
    if reason := pallas.no_tpu(q, k, v):
        return reason
    return None if chunk is None else _refuse(state, chunk)


def _refuse(state, chunk):
    most = max(CHUNK, min(256, NUMBERS // max(state.shape[2:])))
    if chunk < LEAST or chunk > most or chunk & (chunk - 1):
        return f"its chunks are powers of two from {LEAST} to {most}, not {chunk}"
    return None


def linear_attention(q, k, v, log_decay, state, reset, chunk):
    """The public function's arguments after its checks."""
    T, heads = q.shape[1], state.shape[1]
    common = jnp.result_type(q, k, v)
    q, k, v = (x.astype(common) for x in (q, k, v))
    if chunk is None:
        about = features(q, k, v, log_decay.ndim == 4)
        fits = partial(_refuse, state)
        chunk = tuned.size("linear_attention", "pallas_tpu", CHUNK, fits, **about)
    size = min(chunk, max(LEAST, 1 << (T - 1).bit_length()))
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, T, heads))
    padding = -T % size

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    q, k, v, log_decay = pad(q), pad(k), pad(v), pad(log_decay)
    segment = None
    if reset is not None:
        begins = rearrange(pad(reset), "b (n c) -> b 1 n 1 c", c=size)
        segment = jnp.cumsum(begins, axis=-1, dtype=jnp.int32)
    q, k, v = (rearrange(x, "b t g k -> b g t k") for x in (q, k, v))
    if log_decay.ndim == 4:
        log_decay = rearrange(log_decay, "b t h k -> b h t k")
    else:
        log_decay = rearrange(log_decay, "b (n c) h -> b h n 1 c", c=size)
    y, state = _chunkwise(
        pallas.target(), size, q, k, v, log_decay, jnp.swapaxes(state, 2, 3), segment
    )
    return rearrange(y, "b h t v -> b t h v")[:, :T], jnp.swapaxes(state, 2, 3)


class Chunk:
    """One chunk's tiles and decays, as both passes need them; `exact` multiplies in float32."""

    def __init__(self, q, k, v, log, segment):
        size = q.shape[0]
        self.exact = q.dtype == jnp.float32
        self.q, self.k, self.v = (x.astype(jnp.float32) for x in (q, k, v))
        self.i, self.j = index((size, size), 0), index((size, size), 1)
        self.eye = diagonal(size)
        self.vector = log.shape[0] > 1
        self.segment = segment
        if segment is not None:
            begins = segment.astype(jnp.float32)  # exact; an integer would be summed in two halves
            own, end = column(begins), begins[:, -1:]
            self.begins, self.own = begins, own
            self.same, self.first = own == begins, own == 0
            self.last, self.cut = own == end, end > 0
        if self.vector:
            self.levels, prefix, suffix = levels(log)
        else:
            self.weight = jnp.where(self.i >= self.j, jnp.exp(between(log)), 0)
            prefix = jnp.sum(jnp.where(self.j <= self.i, log, 0), axis=1, keepdims=True)
            suffix = jnp.sum(jnp.where(self.j > self.i, log, 0), axis=1, keepdims=True)
        self.from_start, self.to_end = jnp.exp(prefix), jnp.exp(suffix)
        self.whole = self.from_start[-1:]  # (1, K or 1)

    def dot(self, x, y, dims):
        return product(x, y, dims, self.exact)

    def only(self, where, x):
        """x where the named mask of documents holds, else zero."""
        return x if self.segment is None else jnp.where(getattr(self, where), x, 0)

    def unbroken(self, x):
        """x where no document starts in the chunk, else zero."""
        return x if self.segment is None else jnp.where(self.cut, 0, x)

    def parts(self, level):
        """True where tokens i (row) and j (column) part at this level of the tree."""
        i, j = self.i >> level, self.j >> level
        return (i == j + 1) & (i & 1 == 1)

    def scores(self):
        """q_i . k_j times the decay from j to i, zero unless j <= i in one document."""
        if not self.vector:
            scores = self.dot(self.q, self.k, "ik,jk->ij")
            scores = jnp.where(self.i >= self.j, scores * self.weight, 0)
            return self.only("same", scores)
        own = jnp.sum(self.q * self.k, axis=1, keepdims=True)
        scores = jnp.where(self.eye, own, 0)
        for level, decay in enumerate(self.levels):
            part = self.dot(self.q * decay, self.k * decay, "ik,jk->ij")
            scores = jnp.where(self.parts(level), part, scores)
        return self.only("same", scores)

    def scores_pull(self, d):
        """Gradients of q and k from that of the scores off the diagonal."""
        d = self.only("same", d)
        if not self.vector:
            d = jnp.where(self.i > self.j, d * self.weight, 0)
            return self.dot(d, self.k, "ij,jk->ik"), self.dot(d, self.q, "ij,ik->jk")
        dq, dk = jnp.zeros_like(self.q), jnp.zeros_like(self.k)
        for level, decay in enumerate(self.levels):
            part = jnp.where(self.parts(level), d, 0)
            dq += decay * self.dot(part, self.k * decay, "ij,jk->ik")
            dk += decay * self.dot(part, self.q * decay, "ij,ik->jk")
        return dq, dk

    def decay_pull(self, inside, at_start, at_end, through):
        """Gradient of the logs: what crosses each token, summed over no more than the chunk."""
        if not self.vector:
            inside, at_start, at_end, through = (
                jnp.sum(x, axis=1, keepdims=True) for x in (inside, at_start, at_end, through)
            )
        crossing = self.from_here(inside + at_start)
        crossing += self.only("last", self.before(at_end)) + self.unbroken(through)
        if self.segment is None:
            return crossing
        starts = jnp.where(self.i == self.j + 1, self.begins, 0)
        previous = jnp.sum(starts, axis=1, keepdims=True)
        return jnp.where(self.own > previous, 0, crossing)

    def from_here(self, x):
        """Sum of x (C, K) from each token to its document's end."""
        size = x.shape[0]
        if not self.vector:
            later = self.only("same", jnp.where(self.j >= self.i, pallas.row(x), 0))
            return jnp.sum(later, axis=1, keepdims=True)
        for step in doubling(size):
            rows = index(x.shape, 0)
            ahead = rows < size - step
            if self.segment is not None:
                own = jnp.broadcast_to(self.own, x.shape)
                ahead &= own == roll(own, size - step)
            x += jnp.where(ahead, roll(x, size - step), 0)
        return x

    def before(self, x):
        """Sum of x (C, K) over the tokens before each."""
        if not self.vector:
            earlier = jnp.where(self.j < self.i, pallas.row(x), 0)
            return jnp.sum(earlier, axis=1, keepdims=True)
        x = jnp.where(index(x.shape, 0) > 0, roll(x, 1), 0)
        for step in doubling(x.shape[0]):
            x += jnp.where(index(x.shape, 0) >= step, roll(x, step), 0)
        return x


def doubling(size):
    """1, 2, 4, ... below `size`."""
    return [1 << n for n in range((size - 1).bit_length())]


def roll(x, shift):
    """Rows moved down by `shift`, around the end."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.roll(x, shift, 0)


def levels(log):
    """(what each token decays by at each level of the tree, sums from the start, sums to the end).

    At a level a token in a right child decays from the child's start, the token included, one in a
    left child to the child's end, the token left out.
    """
    size = log.shape[0]
    rows = index(log.shape, 0)
    prefix, suffix, decays = log, jnp.zeros_like(log), []
    for block in doubling(size):
        right = rows & block != 0
        decays.append(jnp.exp(jnp.where(right, prefix, suffix)))
        total = prefix + suffix
        sibling = jnp.where(right, roll(total, block), roll(total, size - block))
        prefix = jnp.where(right, prefix + sibling, prefix)
        suffix = jnp.where(right, suffix, suffix + sibling)
    return decays, prefix, suffix


def between(log):
    """Sum of the logs (1, C) after j up to i, (C, C): a running sum down each column."""
    size = log.shape[1]
    i, j = index((size, size), 0), index((size, size), 1)
    sums = jnp.where(i > j, column(log), 0)
    for step in doubling(size):
        sums += jnp.where(i >= step, roll(sums, step), 0)
    return sums


def _forward_kernel(packed, keep, q, k, v, log, state, *refs):
    from jax.experimental import pallas as pl

    segment = refs[0][...] if packed else None
    y, final, *kept, S = refs[packed:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        S[...] = state[...]

    if keep:
        kept[0][...] = S[...]
    c = Chunk(q[...], k[...], v[...], log[...], segment)
    out = c.dot(c.scores(), c.v, "ij,jv->iv")
    out += c.only("first", c.dot(c.q * c.from_start, S[...], "ik,vk->iv"))
    y[...] = out.astype(y.dtype)
    given = c.only("last", c.k * c.to_end)
    S[...] = c.unbroken(c.whole * S[...]) + c.dot(c.v, given, "jv,jk->vk")

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final[...] = S[...]


def _backward_kernel(packed, q, k, v, log, before, dy, d_final, *refs):
    from jax.experimental import pallas as pl

    segment = refs[0][...] if packed else None
    dq, dk, dv, d_log, d_state, dS = refs[packed:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dS[...] = d_final[...]

    c = Chunk(q[...], k[...], v[...], log[...], segment)
    before, after, dy = before[...], dS[...], dy[...].astype(jnp.float32)
    d_scores = c.dot(dy, c.v, "iv,jv->ij")
    dq_inside, dk_inside = c.scores_pull(d_scores)
    dq_start = c.only("first", c.dot(dy, before, "iv,vk->ik") * c.from_start)
    dk_end = c.only("last", c.dot(c.v, after, "jv,vk->jk") * c.to_end)
    own = jnp.sum(jnp.where(c.eye, d_scores, 0), axis=1, keepdims=True)
    dq[...] = dq_inside + dq_start + own * c.k
    dk[...] = dk_inside + dk_end + own * c.q
    # masked after the product: what overflowed in one document would make nan of another's zeros
    dv_end = c.only("last", c.dot(c.k * c.to_end, after, "jk,vk->jv"))
    dv[...] = c.dot(c.scores(), dy, "ij,iv->jv") + dv_end
    through = jnp.sum(c.whole * before * after, axis=0, keepdims=True)
    crossing = c.decay_pull(
        c.q * dq_inside - c.k * dk_inside, c.q * dq_start, c.k * dk_end, through
    )
    d_log[...] = crossing if c.vector else pallas.row(crossing)
    seen = c.only("first", c.q * c.from_start)
    dS[...] = c.unbroken(c.whole * after) + c.dot(dy, seen, "iv,ik->vk")

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_state[...] = dS[...]


def _forward(device, size, q, k, v, log, state, segment, keep=True):
    grid = (*state.shape[:2], q.shape[2] // size)
    at = pallas.Blocks(size, grid)
    tokens = [(at, q), (at, k), (at, v), (at, log), (at.state, state)]
    packed = segment is not None
    outputs = [
        (at, pallas.shape(*grid[:2], q.shape[2], v.shape[3], dtype=jnp.result_type(q, k, v))),
        (at.state, pallas.shape(*state.shape)),
        *([(at, pallas.shape(*grid, *state.shape[2:]))] if keep else []),
    ]
    kernel = partial(_forward_kernel, packed, keep)
    inputs = [*tokens, (at, segment)] if packed else tokens
    y, final, *states = pallas.over_chunks(device, kernel, grid, inputs, outputs, [state.shape[2:]])
    return (y, final), (q, k, v, log, segment, *states)


def _backward(device, size, residuals, cotangents):
    q, k, v, log, segment, states = residuals
    dy, d_final = cotangents
    grid = states.shape[:3]
    at = pallas.Blocks(size, grid, reverse=True)
    packed = segment is not None
    inputs = [*((at, x) for x in (q, k, v, log, states, dy)), (at.state, d_final)]
    inputs += [(at, segment)] if packed else []
    outputs = [
        *((at, pallas.shape(*grid[:2], *x.shape[2:])) for x in (q, k, v, log)),
        (at.state, pallas.shape(*d_final.shape)),
    ]
    kernel = partial(_backward_kernel, packed)
    *gradients, d_state = pallas.over_chunks(
        device, kernel, grid, inputs, outputs, [d_final.shape[2:]]
    )
    inputs = zip(gradients, (q, k, v, log), strict=True)
    return (*(pallas.collect(d, x.shape[:2]).astype(x.dtype) for d, x in inputs), d_state, None)


def _values(device, size, q, k, v, log, state, segment):
    return _forward(device, size, q, k, v, log, state, segment, keep=False)[0]


_chunkwise = jax.custom_vjp(_values, nondiff_argnums=(0, 1))
_chunkwise.defvjp(keep.rule(_forward), _backward)
