"""Chunkwise linear attention: a scan over small chunks, exact for every decay.

Inside a chunk every pair of tokens j < i parts at one node of a binary tree over the chunk, i in
the right child and j in the left. The decay between them is what i sees from the start of the right
child times what j has left to the end of the left child, exp(prefix_i) exp(suffix_j): two sums of
non-positive logs, so nothing overflows and, unlike in a difference of cumulative sums, nothing
cancels. That is the secondary chunking of GLA (arXiv:2312.06635, section 4.3) taken down to single
tokens: each level of the tree is one masked matrix product, and a chunk stays in cache.

On a CPU a step of the scan takes so many chunks of a row, or rows where they are short, that its
work hides what it costs to begin one and its arrays stay in cache, whatever the batch and length:
what a chunk does by itself is done for all of them at once, and only the state is handed on.
"""

import math
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from .. import keep, tuned
from ..dispatch import target
from ..pallas import collect

AT_ONCE = 4  # chunks, of all rows and heads, that a step of the scan takes on a CPU


def features(q, k, v, vector):
    """What a measured chunk depends on."""
    kind, dtype = "vector" if vector else "scalar", jnp.result_type(q, k, v).name
    return {"decay": kind, "K": q.shape[3], "V": v.shape[3], "dtype": dtype}


@lru_cache
def tree(size):
    """The binary tree over a chunk of `size` tokens.

    sums (L + 2, size, size) of 0 and 1: row l, i adds the logs that token i needs at level l, then
    those from the chunk's start to i, and from after i to the chunk's end. pairs (L, size, size):
    True where the level parts i (row) and j (column).
    """
    i, j = np.arange(size)[:, None], np.arange(size)[None, :]
    sums, pairs = [], []
    for level in range((size - 1).bit_length()):
        block = 2**level
        right, mine = i // block % 2 == 1, i // block == j // block
        sums.append(mine & np.where(right, j <= i, j > i))
        pairs.append((i // block // 2 == j // block // 2) & right & (j // block % 2 == 0))
    pairs = np.stack(pairs) if pairs else np.zeros((0, size, size), bool)
    return np.stack([*sums, j <= i, j > i]), pairs


def linear_attention(q, k, v, log_decay, state, reset, chunk):
    """The public function's arguments after its checks; `chunk` None chooses by measurement."""
    T, H = q.shape[1], state.shape[1]
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, T, H))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    cpu = target().platform == "cpu"
    if chunk is None:
        vector = log_decay.shape[-1] > 1
        default = 64 if not cpu else 16 if vector else 32
        chunk = tuned.size("linear_attention", "xla", default, **features(q, k, v, vector))
    sizes = _sizes(q.shape[0], T, H, chunk, AT_ONCE * chunk if cpu else 0)
    padding = -T % math.prod(sizes[1:])

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x

    q, k, v, log_decay = pad(q), pad(k), pad(v), pad(log_decay)
    reset = None if reset is None else pad(reset)
    y, state = _chunkwise(sizes, q, k, v, log_decay, state, reset)
    return y[:, :T].astype(jnp.result_type(q, k, v)), state


def _sizes(B, T, H, chunk, at_once):
    """Of a step: rows, chunks of each, tokens of a chunk. All rows and one chunk if not at_once.

    Rows are the divisor of the batch that is nearest to what the step may take.
    """
    size = min(chunk, T)
    if not (at_once and B):
        return B, 1, size
    chunks = -(-T // size)
    steps = -(-chunks // max(1, at_once // (H * size)))
    several = -(-chunks // steps)
    most = max(1, at_once // (H * size * several)) if steps == 1 else 1
    divisors = (rows for rows in range(1, B + 1) if B % rows == 0)
    return min(divisors, key=lambda rows: max(rows / most, most / rows)), several, size


class Chunk:
    """The arrays of chunks as (..., H, C, features), and what both passes need of them.

    `reset` is (..., C); of `state` (..., H, K, V) the dtype and the heads are read.
    """

    def __init__(self, q, k, v, log_decay, reset, state):
        exact, heads, size = state.dtype, state.shape[-3], q.shape[-2]
        # bf16 inputs may use an accelerator's fast products, float32 ones may not.
        precision = "highest" if jnp.result_type(q, k, v) == exact else None
        self.dot = partial(jnp.einsum, precision=precision, preferred_element_type=exact)
        self.q, self.k, self.v = (
            repeat(x, "... g c k -> ... (g r) c k", r=heads // x.shape[-3]).astype(exact)
            for x in (q, k, v)
        )
        sums, pairs = tree(size)
        pairs = np.expand_dims(pairs, tuple(range(1, q.ndim - 1)))  # (L, ..., H, i, j)
        self.pairs, self.pairs_T = pairs, pairs.swapaxes(-1, -2)
        self.diagonal = np.eye(size, dtype=bool)
        self.vector = log_decay.shape[-1] > 1
        decay = jnp.exp(_products(sums.astype(exact), log_decay, self.vector))
        levels, self.from_start, self.to_end = decay[:-2], decay[-2], decay[-1]
        self.whole = self.from_start[..., -1, :, None]  # (..., H, K or 1, 1)
        if self.vector:
            self.levels, self.q_levels, self.k_levels = levels, self.q * levels, self.k * levels
        else:
            between = jnp.where(self.pairs, levels * levels.swapaxes(-1, -2), 0)
            self.weight = _total(between)  # the decay from j to i, for j < i
        self.reset = reset
        if reset is not None:
            segment = jnp.cumsum(reset, axis=-1, dtype=jnp.int32)[..., None, :]
            self.same = segment[..., None] == segment[..., None, :]
            self.first = segment[..., None] == 0
            self.last = segment[..., None] == segment[..., -1:, None]
            self.cut = reset.any(axis=-1)[..., None, None, None]

    def only(self, where, x):
        """x where the named mask of documents holds, else zero."""
        return x if self.reset is None else jnp.where(getattr(self, where), x, 0)

    def unbroken(self, x):
        """x where no document starts in the chunk, else zero."""
        return x if self.reset is None else jnp.where(self.cut, 0, x)

    def handed(self, state, given, reverse=False):
        """What each chunk is handed (M, B, H, K, V), and what the last hands on (B, H, K, V).

        A chunk hands on what it is handed times its whole decay, and what it gives (as the former).
        """

        def next_(state, xs):
            whole, cut, given = xs
            kept = whole * state
            return (kept if cut is None else jnp.where(cut, 0, kept)) + given, state

        xs = self.whole, None if self.reset is None else self.cut, given
        last, handed = jax.lax.scan(next_, state, xs, reverse=reverse, unroll=True)
        return handed, last

    def weighted(self, scores):
        """Scores of j < i times the decay between, else zero, where they overflow too."""
        return jnp.where(self.pairs.any(axis=0), scores * self.weight, 0)

    def own(self, scores):
        """A token's score with itself, which no decay touches: the diagonal as a column."""
        return jnp.sum(jnp.where(self.diagonal, scores, 0), axis=-1)[..., None]

    def scores(self):
        """q_i . k_j times the decay from j to i: (..., H, i, j)."""
        if not self.vector:
            scores = self.dot("...ik,...jk->...ij", self.q, self.k)
            scores = jnp.where(self.diagonal, scores, self.weighted(scores))
            return self.only("same", scores)
        parts = self.dot("...ik,...jk->...ij", self.q_levels, self.k_levels)
        own = _sum(self.q * self.k)
        scores = _total(jnp.where(self.pairs, parts, 0))
        return self.only("same", jnp.where(self.diagonal, own, scores))

    def scores_pull(self, d, d_T):
        """Gradients of q and k from that of `scores`, plain and transposed, off the diagonal."""
        d, d_T = self.only("same", d), self.only("same", d_T)
        if not self.vector:
            d, d_T = self.weighted(d), self.weighted(d_T.swapaxes(-1, -2)).swapaxes(-1, -2)
            return self.dot("...ij,...jk->...ik", d, self.k), self.dot(
                "...ji,...ik->...jk", d_T, self.q
            )
        dq = self.dot("...ij,...jk->...ik", jnp.where(self.pairs, d, 0), self.k_levels)
        dk = self.dot("...ji,...ik->...jk", jnp.where(self.pairs_T, d_T, 0), self.q_levels)
        return _total(self.levels * dq), _total(self.levels * dk)

    def decay_pull(self, inside, at_start, at_end, through):
        """Gradient of the logs: what crosses token t, and no difference reaches beyond the chunk.

        inside (..., H, C, K): what tokens read less what they give within the chunk; at_start: what
        they read of the incoming state; at_end: what they give to the outgoing one; through
        (..., H, 1, K): what passes the chunk whole.
        """
        if not self.vector:
            inside, at_start, at_end, through = map(_sum, (inside, at_start, at_end, through))
        later = self.sums_from_here(inside + at_start)
        before = tree(self.q.shape[-2])[0][-1].T.astype(at_end.dtype)
        earlier = jnp.matmul(before, at_end, precision="highest")
        crossing = later + self.only("last", earlier) + self.unbroken(through)
        return (
            crossing
            if self.reset is None
            else jnp.where(self.reset[..., None, :, None], 0, crossing)
        )

    def sums_from_here(self, x):
        """Sum of x (..., H, C, K) from each token to its document's end."""
        after = tree(self.q.shape[-2])[0][-2].T
        total = partial(jnp.matmul, self.only("same", after.astype(x.dtype)), precision="highest")
        if self.reset is None:
            return total(x)
        finite = jnp.isfinite(x)  # a zero times what is not would leave its document
        sums = total(jnp.where(finite, x, 0))
        return jnp.where(total((~finite).astype(x.dtype)) > 0, jnp.nan, sums)


def _products(matrices, x, vector):
    """Each of (L, C, C) times x (..., C, K): (L, ..., C, K), features or tokens last in memory."""
    if not vector:
        return jnp.einsum("lij,...jk->l...ik", matrices, x, precision="highest")
    contracted = ((2,), (x.ndim - 2,)), ((), ())
    return jnp.moveaxis(jax.lax.dot_general(matrices, x, contracted, precision="highest"), 1, -2)


def _sum(x):
    """The sum over the last axis, which stays: a product with ones, for XLA's own is slow here."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")


def _total(x):
    """The sum over levels, of which there may be none: XLA's own, over a leading axis, is slow."""
    return sum(x[1:], x[0]) if len(x) else jnp.sum(x, axis=0)


def _forward(sizes, q, k, v, log_decay, state, reset):
    def step(state, xs):
        c = Chunk(*_by_chunk(xs, sizes[2]), state)
        kept = c.only("last", c.k * c.to_end)
        before, state = c.handed(state, c.dot("...jk,...jv->...kv", kept, c.v))
        y = c.dot("...ij,...jv->...iv", c.scores(), c.v)
        y += c.only("first", c.dot("...ik,...kv->...iv", c.q * c.from_start, before))
        return state, (_by_token(y), before)

    final, (y, states) = _scan(step, sizes, state, (q, k, v, log_decay, reset))
    return (_join(y, q.shape), final), (q, k, v, log_decay, reset, states)


def _backward(sizes, residuals, cotangents):
    *inputs, states = residuals
    dy, d_final = cotangents

    def step(d_last, xs):
        *xs, before = xs
        *xs, dy = _by_chunk(xs, sizes[2])
        c = Chunk(*xs, before)
        seen = c.only("first", c.q * c.from_start)
        d_next, d_first = c.handed(d_last, c.dot("...ik,...iv->...kv", seen, dy), reverse=True)
        d_scores = c.dot("...iv,...jv->...ij", dy, c.v)
        dq_inside, dk_inside = c.scores_pull(d_scores, c.dot("...jv,...iv->...ji", c.v, dy))
        dq_start = c.only("first", c.dot("...iv,...kv->...ik", dy, before) * c.from_start)
        dk_end = c.only("last", c.dot("...jv,...kv->...jk", c.v, d_next) * c.to_end)
        d_decay = c.decay_pull(
            c.q * dq_inside - c.k * dk_inside,
            c.q * dq_start,
            c.k * dk_end,
            _sum(c.whole * before * d_next).swapaxes(-1, -2),
        )
        own = c.own(d_scores)
        dq, dk = dq_inside + dq_start + own * c.k, dk_inside + dk_end + own * c.q
        dv = c.dot("...ij,...iv->...jv", c.scores(), dy)
        dv += c.only("last", c.dot("...jk,...kv->...jv", c.k * c.to_end, d_next))
        grads = zip((dq, dk, dv, d_decay), xs[:4], strict=True)
        return d_first, tuple(
            _by_token(jax.vmap(partial(collect, like=x.shape[1:3]))(d)) for d, x in grads
        )

    d_state, grads = _scan(step, sizes, d_final, (*inputs, dy), (states,), reverse=True)
    grads = zip(grads, inputs[:4], strict=True)
    return *(_join(d, x.shape).astype(x.dtype) for d, x in grads), d_state, None


def _outputs(sizes, q, k, v, log_decay, state, reset):
    """y in the state's dtype and the final state, for T a multiple of a step's tokens of a row."""
    return _forward(sizes, q, k, v, log_decay, state, reset)[0]


_chunkwise = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunkwise.defvjp(keep.rule(_forward), _backward)


def _scan(step, sizes, state, arrays, stacked=(), reverse=False):
    """The last states, and what the steps return, stacked.

    step(state, (*arrays, *stacked)) is of p blocks of rows, one after the other, and of each of n
    steps along its tokens: arrays (B or 1, T, ...), where 1 is for all rows, are cut into them;
    what is stacked (p n, ...) is as steps return it.
    """
    arrays = jax.tree.map(partial(_split, sizes=sizes), arrays)
    leaves, structure = jax.tree.flatten(arrays)
    blocks = len(state) // sizes[0] if sizes[0] else 1
    if blocks == 1:
        return jax.lax.scan(
            lambda state, xs: step(state, (*xs[0], *xs[1])),
            state,
            (arrays, stacked),
            reverse=reverse,
        )
    first = rearrange(state, "(p b) ... -> p b ...", p=blocks)
    steps = leaves[0].shape[0] // blocks
    of_block = [x.shape[0] == leaves[0].shape[0] for x in leaves]

    def body(carry, xs):
        (state, last), (i, own, *more) = carry, xs
        at, n = i // steps, i % steps
        state = jnp.where(n == (steps - 1 if reverse else 0), first[at], state)
        own = iter(own)
        each = [next(own) if mine else x[n] for mine, x in zip(of_block, leaves, strict=True)]
        state, out = step(state, (*structure.unflatten(each), *more))
        return (state, last.at[at].set(state)), out

    own = [x for mine, x in zip(of_block, leaves, strict=True) if mine]
    index = jnp.arange(leaves[0].shape[0], dtype=jnp.int32)
    carry, out = jax.lax.scan(body, (first[0], first), (index, own, *stacked), reverse=reverse)
    return rearrange(carry[1], "p b ... -> (p b) ..."), out


def _split(x, sizes):
    """(B, T, ...) -> (p n, b, t, ...): blocks of rows and steps, rows, tokens of a step."""
    rows, tokens = 1 if x.shape[0] == 1 else sizes[0], sizes[1] * sizes[2]
    blocks, steps = (x.shape[0] // rows if rows else 1), x.shape[1] // tokens
    return rearrange(x, "(p b) (n t) ... -> (p n) b t ...", p=blocks, b=rows, n=steps)


def _join(x, shape):
    """What steps return of each token -> (B, T, ...); summed over blocks where B is 1."""
    steps = shape[1] // x.shape[2]
    x = rearrange(x, "(p n) b t ... -> (p b) (n t) ...", n=steps)
    return x if len(x) == shape[0] else x.sum(axis=0, keepdims=True)


def _by_chunk(arrays, size) -> list[Any]:
    """(B, M C, H, K) -> (M, B, H, C, K) of each; (B, M C) -> (M, B, C)."""
    chunks = (
        None if x is None else rearrange(x, "b (m c) ... -> m b c ...", c=size) for x in arrays
    )
    return [x if x is None or x.ndim == 3 else x.swapaxes(2, 3) for x in chunks]


def _by_token(x):
    return rearrange(x, "m b h c k -> b (m c) h k")
