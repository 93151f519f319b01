"""Chunkwise linear attention: a scan over small chunks, exact for every decay.

Inside a chunk every pair of tokens j < i parts at one node of a binary tree over the chunk, i in
the right child and j in the left. The decay between them is what i sees from the start of the right
child times what j has left to the end of the left child, exp(prefix_i) exp(suffix_j): two sums of
non-positive logs, so nothing overflows and, unlike in a difference of cumulative sums, nothing
cancels. That is the secondary chunking of GLA (arXiv:2312.06635, section 4.3) taken down to single
tokens: each level of the tree is one masked matrix product, and a chunk stays in cache.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from .. import tuned
from ..dispatch import target
from ..pallas import collect


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
    if chunk is None:
        vector = log_decay.shape[-1] > 1
        default = 64 if target().platform != "cpu" else 16 if vector else 32
        chunk = tuned.size("linear_attention", "xla", default, **features(q, k, v, vector))
    size = min(chunk, T)
    padding = -T % size

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x

    q, k, v, log_decay = pad(q), pad(k), pad(v), pad(log_decay)
    reset = None if reset is None else pad(reset)
    y, state = _chunkwise(size, q, k, v, log_decay, state, reset)
    return y[:, :T].astype(jnp.result_type(q, k, v)), state


class Chunk:
    """One chunk's arrays as (B, H, C, features), and what both passes need of them."""

    def __init__(self, q, k, v, log_decay, reset, state):
        exact, heads, size = state.dtype, state.shape[1], q.shape[2]
        # bf16 inputs may use an accelerator's fast products, float32 ones may not.
        precision = "highest" if jnp.result_type(q, k, v) == exact else None
        self.dot = partial(jnp.einsum, precision=precision, preferred_element_type=exact)
        self.q, self.k, self.v = (
            repeat(x, "b g c k -> b (g r) c k", r=heads // x.shape[1]).astype(exact)
            for x in (q, k, v)
        )
        sums, pairs = tree(size)
        self.pairs, self.pairs_T = pairs[:, None, None], pairs.swapaxes(1, 2)[:, None, None]
        self.diagonal = np.eye(size, dtype=bool)
        logs = jnp.einsum("lij,bhjk->lbhik", sums.astype(exact), log_decay, precision="highest")
        decay = jnp.exp(logs)
        levels, self.from_start, self.to_end = decay[:-2], decay[-2], decay[-1]
        self.whole = self.from_start[:, :, -1, :, None]  # (B, H, K or 1, 1)
        self.vector = log_decay.shape[-1] > 1
        if self.vector:
            self.levels, self.q_levels, self.k_levels = levels, self.q * levels, self.k * levels
        else:
            between = jnp.where(self.pairs, levels * levels.swapaxes(-1, -2), 0)
            self.weight = jnp.sum(between, axis=0)  # the decay from j to i, for j < i
        self.reset = reset
        if reset is not None:
            segment = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
            self.same = segment[:, None, :, None] == segment[:, None, None, :]
            self.first = segment[:, None, :, None] == 0
            self.last = segment[:, None, :, None] == segment[:, None, -1:, None]
            self.cut = reset.any(axis=1)[:, None, None, None]

    def only(self, where, x):
        """x where the named mask of documents holds, else zero."""
        return x if self.reset is None else jnp.where(getattr(self, where), x, 0)

    def unbroken(self, x):
        """x where no document starts in the chunk, else zero."""
        return x if self.reset is None else jnp.where(self.cut, 0, x)

    def weighted(self, scores):
        """Scores of j < i times the decay between, else zero, where they overflow too."""
        return jnp.where(self.pairs.any(axis=0), scores * self.weight, 0)

    def own(self, scores):
        """A token's score with itself, which no decay touches: the diagonal as a column."""
        return jnp.sum(jnp.where(self.diagonal, scores, 0), axis=-1)[..., None]

    def scores(self):
        """q_i . k_j times the decay from j to i: (B, H, i, j)."""
        if not self.vector:
            scores = self.dot("bhik,bhjk->bhij", self.q, self.k)
            scores = jnp.where(self.diagonal, scores, self.weighted(scores))
            return self.only("same", scores)
        parts = self.dot("lbhik,lbhjk->lbhij", self.q_levels, self.k_levels)
        own = jnp.sum(self.q * self.k, axis=-1)[..., None]
        scores = jnp.sum(jnp.where(self.pairs, parts, 0), axis=0)
        return self.only("same", jnp.where(self.diagonal, own, scores))

    def scores_pull(self, d, d_T):
        """Gradients of q and k from that of `scores`, plain and transposed, off the diagonal."""
        d, d_T = self.only("same", d), self.only("same", d_T)
        if not self.vector:
            d, d_T = self.weighted(d), self.weighted(d_T.swapaxes(-1, -2)).swapaxes(-1, -2)
            return self.dot("bhij,bhjk->bhik", d, self.k), self.dot("bhji,bhik->bhjk", d_T, self.q)
        dq = self.dot("lbhij,lbhjk->lbhik", jnp.where(self.pairs, d, 0), self.k_levels)
        dk = self.dot("lbhji,lbhik->lbhjk", jnp.where(self.pairs_T, d_T, 0), self.q_levels)
        return jnp.sum(self.levels * dq, axis=0), jnp.sum(self.levels * dk, axis=0)

    def decay_pull(self, inside, at_start, at_end, through):
        """Gradient of the logs: what crosses token t, and no difference reaches beyond the chunk.

        inside: what tokens read less what they give within the chunk, (B, H, C, K); at_start: what
        they read of the incoming state; at_end: what they give to the outgoing one; through
        (B, H, 1, K): what passes the chunk whole.
        """
        if not self.vector:
            inside, at_start, at_end, through = (
                jnp.sum(x, axis=-1, keepdims=True) for x in (inside, at_start, at_end, through)
            )
        later = self.sums_from_here(inside + at_start)
        before = tree(self.q.shape[2])[0][-1].T.astype(at_end.dtype)
        earlier = jnp.matmul(before, at_end, precision="highest")
        crossing = later + self.only("last", earlier) + self.unbroken(through)
        return (
            crossing if self.reset is None else jnp.where(self.reset[:, None, :, None], 0, crossing)
        )

    def sums_from_here(self, x):
        """Sum of x (B, H, C, K) from each token to its document's end."""
        after = tree(self.q.shape[2])[0][-2].T
        total = partial(jnp.matmul, self.only("same", after.astype(x.dtype)), precision="highest")
        if self.reset is None:
            return total(x)
        finite = jnp.isfinite(x)  # a zero times what is not would leave its document
        sums = total(jnp.where(finite, x, 0))
        return jnp.where(total((~finite).astype(x.dtype)) > 0, jnp.nan, sums)


def _forward(size, q, k, v, log_decay, state, reset):
    def body(state, xs):
        c = Chunk(*xs, state)
        y = c.dot("bhij,bhjv->bhiv", c.scores(), c.v)
        y += c.only("first", c.dot("bhik,bhkv->bhiv", c.q * c.from_start, state))
        kept = c.only("last", c.k * c.to_end)
        return c.unbroken(c.whole * state) + c.dot("bhjk,bhjv->bhkv", kept, c.v), (y, state)

    xs = (*(_split(x, size) for x in (q, k, v, log_decay)), _split_reset(reset, size))
    final, (y, states) = jax.lax.scan(body, state, xs)
    return (_join(y), final), (q, k, v, log_decay, reset, states)


def _backward(size, residuals, cotangents):
    q, k, v, log_decay, reset, states = residuals
    dy, d_final = cotangents

    def body(d_next, xs):
        *xs, dy, before = xs
        c = Chunk(*xs, before)
        d_scores = c.dot("bhiv,bhjv->bhij", dy, c.v)
        dq_inside, dk_inside = c.scores_pull(d_scores, c.dot("bhjv,bhiv->bhji", c.v, dy))
        dq_start = c.only("first", c.dot("bhiv,bhkv->bhik", dy, before) * c.from_start)
        dk_end = c.only("last", c.dot("bhjv,bhkv->bhjk", c.v, d_next) * c.to_end)
        d_decay = c.decay_pull(
            c.q * dq_inside - c.k * dk_inside,
            c.q * dq_start,
            c.k * dk_end,
            jnp.sum(c.whole * before * d_next, axis=-1)[:, :, None],
        )
        own = c.own(d_scores)
        dq, dk = dq_inside + dq_start + own * c.k, dk_inside + dk_end + own * c.q
        dv = c.dot("bhij,bhiv->bhjv", c.scores(), dy)
        dv += c.only("last", c.dot("bhjk,bhkv->bhjv", c.k * c.to_end, d_next))
        seen = c.only("first", c.q * c.from_start)
        d_before = c.unbroken(c.whole * d_next) + c.dot("bhik,bhiv->bhkv", seen, dy)
        grads = zip((dq, dk, dv, d_decay), xs, strict=False)
        return d_before, tuple(collect(d, x.shape[:2]) for d, x in grads)

    xs = (*(_split(x, size) for x in (q, k, v, log_decay)), _split_reset(reset, size))
    d_state, grads = jax.lax.scan(body, d_final, (*xs, _split(dy, size), states), reverse=True)
    grads = zip(grads, (q, k, v, log_decay), strict=True)
    return (*(_join(d).astype(x.dtype) for d, x in grads), d_state, None)


def _outputs(size, q, k, v, log_decay, state, reset):
    """y in the state's dtype and the final state, for T a multiple of `size`."""
    return _forward(size, q, k, v, log_decay, state, reset)[0]


_chunkwise = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunkwise.defvjp(_forward, _backward)


def _split(x, size):
    return rearrange(x, "b (n c) h k -> n b h c k", c=size)


def _split_reset(reset, size):
    return None if reset is None else rearrange(reset, "b (n c) -> n b c", c=size)


def _join(x):
    return rearrange(x, "n b h c k -> b (n c) h k")
