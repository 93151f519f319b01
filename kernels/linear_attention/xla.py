"""Chunkwise linear attention: a scan over small chunks, exact for every decay.

Inside a chunk every pair of tokens j < i parts at one node of a binary tree over the chunk, i in
the right child and j in the left. The decay between them is what i sees from the start of the right
child times what j has left to the end of the left child: two products of numbers of at most 1, so
nothing overflows and, unlike in a difference of cumulative sums of logs, nothing cancels. That is
the secondary chunking of GLA (arXiv:2312.06635, section 4.3) taken down to single tokens: each
level of the tree is one masked matrix product, and a chunk stays in cache. On a level a token is in
a right child, and its query counts, or in a left one, and its key does: one array holds both.

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
def parted(size):
    """Where a level of the tree over a chunk of `size` tokens parts i (row) and j (column).

    (L, size, size) of bool, with i in the right child; and (L, size, 1): which tokens are in one.
    """
    i, j = np.arange(size)[:, None], np.arange(size)[None, :]
    block = 2 ** np.arange((size - 1).bit_length())[:, None, None]
    right = i // block % 2 == 1
    return (i // block // 2 == j // block // 2) & right & (j // block % 2 == 0), right


def decays(decay):
    """What a chunk needs, of each token's decay (..., C, K): products of numbers of at most 1.

    levels (L, ..., C, K): from the start of a right child to its token, from after a token to the
    end of a left one; and from the chunk's start and to its end, (..., C, K) each.
    """
    *rest, size, features = decay.shape
    depth = (size - 1).bit_length()
    ends = [(0, 0)] * len(rest) + [(0, 2**depth - size), (0, 0)]
    prefix = jnp.pad(decay, ends, constant_values=1) if ends[-2][1] else decay
    suffix, levels = jnp.ones_like(prefix), []
    right = np.array([False, True])[:, None, None]
    for level in range(depth):
        pairs = (*rest, 2**depth >> level + 1, 2, 2**level, features)
        prefix, suffix = prefix.reshape(pairs), suffix.reshape(pairs)
        levels.append(jnp.where(right, prefix, suffix))
        before, after = prefix[..., :1, -1:, :], prefix[..., 1:, -1:, :]
        prefix = prefix * jnp.where(right, before, 1)
        suffix = suffix * jnp.where(right, 1, after)
        # else the next level computes these again in each place that reads them, and so on
        prefix, suffix = jax.lax.optimization_barrier((prefix, suffix))
    *levels, prefix, suffix = (
        x.reshape(*rest, 2**depth, features)[..., :size, :] for x in (*levels, prefix, suffix)
    )
    levels = jnp.stack(levels) if levels else jnp.zeros((0, *decay.shape), decay.dtype)
    return levels, prefix, suffix


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
        pairs, self.right = (  # (L, ..., H, i, j) and (L, ..., H, i, 1)
            np.expand_dims(x, tuple(range(1, q.ndim - 1))) for x in parted(size)
        )
        self.pairs = pairs, pairs.swapaxes(-1, -2)  # the latter turned: (L, ..., H, j, i)
        self.diagonal = np.eye(size, dtype=bool)
        self.vector = log_decay.shape[-1] > 1
        levels, self.from_start, self.to_end = decays(jnp.exp(log_decay))
        self.whole = self.from_start[..., -1, :, None]  # (..., H, K or 1, 1)
        if self.vector:
            tokens = jnp.where(self.right, self.q, self.k) * levels
            self.levels, self.tokens = levels, jax.lax.optimization_barrier(tokens)
        else:
            between = jnp.where(
                self.pairs[False] | self.pairs[True], levels * levels.swapaxes(-1, -2), 0
            )
            self.weight = _total(between)  # the decay between two tokens, zero of one and itself
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

    def weighted(self, scores, turned=False):
        """Scores of j < i times the decay between, else zero, where they overflow too."""
        return jnp.where(self.pairs[turned].any(axis=0), scores * self.weight, 0)

    def own(self, scores):
        """A token's score with itself, which no decay touches: the diagonal as a column."""
        return jnp.sum(jnp.where(self.diagonal, scores, 0), axis=-1)[..., None]

    def scores(self, turned=False):
        """q_i . k_j times the decay from j to i: (..., H, i, j), or turned (..., H, j, i)."""
        if not self.vector:
            rows, columns = (self.k, self.q) if turned else (self.q, self.k)
            scores = self.dot("...ik,...jk->...ij", rows, columns)
            scores = jnp.where(self.diagonal, scores, self.weighted(scores, turned))
            return self.only("same", scores)
        parts = self.dot("...ik,...jk->...ij", self.tokens, self.tokens)
        own = _sum(self.q * self.k)
        scores = _total(jnp.where(self.pairs[turned], parts, 0))
        return self.only("same", jnp.where(self.diagonal, own, scores))

    def scores_pull(self, d, d_T):
        """Gradients of q and k from that of `scores`, plain and transposed, off the diagonal."""
        d, d_T = self.only("same", d), self.only("same", d_T)
        if not self.vector:
            d, d_T = self.weighted(d), self.weighted(d_T, turned=True)
            return self.dot("...ij,...jk->...ik", d, self.k), self.dot(
                "...ji,...ik->...jk", d_T, self.q
            )
        both = jnp.where(self.pairs[False], d, jnp.where(self.pairs[True], d_T, 0))
        pulled = self.levels * self.dot("...ij,...jk->...ik", both, self.tokens)
        dq, dk = jnp.where(self.right, pulled, 0), jnp.where(self.right, 0, pulled)
        return jax.lax.optimization_barrier((_total(dq), _total(dk)))

    def decay_pull(self, inside, at_start, at_end, through):
        """Gradient of the logs: what crosses token t, and no difference reaches beyond the chunk.

        inside (..., H, C, K): what tokens read less what they give within the chunk; at_start: what
        they read of the incoming state; at_end: what they give to the outgoing one; through
        (..., H, 1, K): what passes the chunk whole.
        """
        if not self.vector:
            inside, at_start, at_end, through = map(_sum, (inside, at_start, at_end, through))
        later = self.sums_from_here(jax.lax.optimization_barrier(inside + at_start))
        earlier = _products(np.tri(self.q.shape[-2], k=-1, dtype=at_end.dtype), at_end)
        crossing = later + self.only("last", earlier) + self.unbroken(through)
        return (
            crossing
            if self.reset is None
            else jnp.where(self.reset[..., None, :, None], 0, crossing)
        )

    def sums_from_here(self, x):
        """Sum of x (..., H, C, K) from each token to its document's end."""
        after = np.tri(self.q.shape[-2], dtype=bool).T
        total = partial(_products, self.only("same", after.astype(x.dtype)))
        if self.reset is None:
            return total(x)
        finite = jnp.isfinite(x)  # a zero times what is not would leave its document
        sums = total(jnp.where(finite, x, 0))
        return jnp.where(total((~finite).astype(x.dtype)) > 0, jnp.nan, sums)


def _products(matrix, x):
    """A matrix (..., C, C) times each chunk (..., C, K): by chunks, for one product of all of them
    would lay x out anew."""
    matrix = jnp.broadcast_to(matrix, (*x.shape[:-1], x.shape[-2]))
    return jnp.matmul(matrix, x, precision="highest")


def _sum(x):
    """The sum over the last axis, which stays: a product with ones, for XLA's own is slow here."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")


def _total(x):
    """The sum over levels, of which there may be none: XLA's own, over a leading axis, is slow."""
    return sum(x[1:], x[0]) if len(x) else jnp.sum(x, axis=0)


def _forward(sizes, q, k, v, log_decay, state, reset):
    def step(state, xs):
        c = Chunk(*_by_chunk(xs, sizes), state)
        kept = c.only("last", c.k * c.to_end)
        before, state = c.handed(state, c.dot("...jk,...jv->...kv", kept, c.v))
        y = c.dot("...ij,...jv->...iv", c.scores(), c.v)
        y += c.only("first", c.dot("...ik,...kv->...iv", c.q * c.from_start, before))
        return state, (_by_token(y), before)

    final, (y, states) = _scan(step, sizes, state, (q, k, v, log_decay, reset))
    return (_join(y, q.shape, sizes), final), (q, k, v, log_decay, reset, states)


def _backward(sizes, residuals, cotangents):
    *inputs, states = residuals
    dy, d_final = cotangents

    def step(d_last, xs):
        *xs, before = xs
        *xs, dy = _by_chunk(xs, sizes)
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
        dv = c.dot("...ji,...iv->...jv", c.scores(turned=True), dy)
        dv += c.only("last", c.dot("...jk,...kv->...jv", c.k * c.to_end, d_next))
        grads = zip((dq, dk, dv, d_decay), xs[:4], strict=True)
        return d_first, tuple(
            _by_token(jax.vmap(partial(collect, like=x.shape[1:3]))(d)) for d, x in grads
        )

    d_state, grads = _scan(step, sizes, d_final, (*inputs, dy), (states,), reverse=True)
    grads = zip(grads, inputs[:4], strict=True)
    return *(_join(d, x.shape, sizes).astype(x.dtype) for d, x in grads), d_state, None


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
    """(B, T, ...) -> (p n, b t, ...): blocks of rows and steps; rows and tokens of a step.

    In one axis, for XLA would lay all of x out anew for an axis of one row.
    """
    rows, tokens = 1 if x.shape[0] == 1 else sizes[0], sizes[1] * sizes[2]
    blocks, steps = (x.shape[0] // rows if rows else 1), x.shape[1] // tokens
    return rearrange(x, "(p b) (n t) ... -> (p n) (b t) ...", p=blocks, b=rows, n=steps)


def _join(x, shape, sizes):
    """What steps return of each token -> (B, T, ...); summed over blocks where B is 1."""
    tokens = sizes[1] * sizes[2]
    x = rearrange(x, "(p n) (b t) ... -> (p b) (n t) ...", n=shape[1] // tokens, t=tokens)
    return x if len(x) == shape[0] else x.sum(axis=0, keepdims=True)


def _by_chunk(arrays, sizes) -> list[Any]:
    """(b M C, H, K) -> (M, b, H, C, K) of each; (b M C) -> (M, b, C)."""
    chunks = (
        None if x is None else rearrange(x, "(b m c) ... -> m b c ...", m=sizes[1], c=sizes[2])
        for x in arrays
    )
    # else each place that reads an array lays it out anew
    return [
        x if x is None or x.ndim == 3 else jax.lax.optimization_barrier(x.swapaxes(2, 3))
        for x in chunks
    ]


def _by_token(x):
    return rearrange(x, "m b h c k -> (b m c) h k")
