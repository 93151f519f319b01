"""Chunkwise linear attention for Hopper GPUs: one walk along the chunks, its state in registers.

The maths is that of `xla.py`. The walk (`pallas_gpu_kernels.walk`) reads the bfloat16 tiles of q, k
and v where the caller has them, computes the scores of scalar decays itself, and writes y; the
backward is the same walk from the last chunk to the first, which makes dv and every chunk's
gradient of the state, and then a second kernel that takes each chunk by itself. What is left to XLA
is small for scalar decays (sums of logs, six numbers a token) and large for vector ones: their
scores and their decayed queries and keys are made by `xla.Chunk`, some chunks at a time.

Bytes a token and head, of K keys and V values. A scalar forward reads 4 K + 2 V and writes 2 V, the
least there is, and 24 + K / 16 of decays beside; each 64 values read q and k again, from the cache.
When differentiated it keeps K V / 32 of states. The backward moves 12 K + 8 V, and the states and
their gradients three times K V / 32; the least without states is 8 K + 6 V. Vector decays add
12 K + 4 C of tiles, and what XLA leaves in memory between its products of the six levels.
Operations: 2 K C for the scores of each 64 values, 2 C V inside the chunk, 4 K V with the state; in
the backward that once more and 6 K C + 2 C V + 4 K V. No more than half of C x C is of use.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import keep, pallas
from ..dispatch import late
from . import xla

CHUNK, WIDEST = 64, 256
PREPARED = 1 << 21  # keys of tokens that XLA prepares at a time for vector decays

walk = late(f"{__package__}.pallas_gpu_kernels", "walk")
gradients = late(f"{__package__}.pallas_gpu_kernels", "gradients")


def refuse(q, k, v, log_decay, state, reset, chunk):
    """Why not, or None."""
    del log_decay, reset
    if reason := pallas.no_hopper(q, k, v):
        return reason
    if chunk not in (None, CHUNK):
        return f"its chunks are of {CHUNK} tokens, not {chunk}"
    for name, width in zip(("key", "value"), state.shape[2:], strict=True):
        if width % CHUNK or width > WIDEST:
            return f"its {name} widths are multiples of {CHUNK} up to {WIDEST}, not {width}"
    return None


def linear_attention(q, k, v, log_decay, state, reset, chunk):
    """The public function's arguments after its checks."""
    del chunk
    B, T, heads = *q.shape[:2], state.shape[1]
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (B, T, heads))
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, -T % CHUNK)] + [(0, 0)] * (x.ndim - 2))

    reset = None if reset is None else pad(reset)
    inputs = pad(q), pad(k), pad(v), pad(log_decay)
    y, state = _chunkwise(pallas.target(), *inputs, state, reset)
    return y[:, :T], state


def split(x):
    """(B, T, ...) -> (B N, C, ...)."""
    return x.reshape(-1, CHUNK, *x.shape[2:])


def by_head(x):
    """(B N, C, heads, features) -> (B N, heads, C, features)."""
    return jnp.swapaxes(x, 1, 2)


def two_floats(log):
    """Running sums along the last axis as a sum and what its rounding left out."""

    def add(a, b):
        total = a[0] + b[0]
        part = total - a[0]
        error = (a[0] - (total - part)) + (b[0] - part)
        return total, error + (a[1] + b[1])

    return jax.lax.associative_scan(add, (log, jnp.zeros_like(log)), axis=log.ndim - 1)


def decays(log, reset):
    """`xla.Chunk` of every chunk, for its decays: the tokens in it are not to be used."""
    x = by_head(split(log))
    return xla.Chunk(x, x, x, x, None if reset is None else split(reset), x)


@partial(jax.jit, static_argnums=2)
def scalar(log, reset, width):
    """rows and whole, as the kernels want them, of logs (B, T, H, 1) for `width` keys."""
    c, batch = decays(log, reset), log.shape[0]
    high, low = two_floats(by_head(split(log))[..., 0])
    place = jnp.arange(CHUNK, dtype=jnp.int32)
    first, last = jnp.zeros_like(place), jnp.full_like(place, CHUNK - 1)
    if reset is not None:
        begins = split(reset)
        first = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)[:, None]
        ends = jnp.pad(begins[:, 1:], [(0, 0), (0, 1)], constant_values=True)
        last = jax.lax.cummin(jnp.where(ends, place, CHUNK), axis=1, reverse=True)[:, None]
    first, last = (jnp.broadcast_to(x, high.shape).astype(high.dtype) for x in (first, last))
    read, give = c.only("first", c.from_start)[..., 0], c.only("last", c.to_end)[..., 0]
    rows = jnp.stack([read, give, high, low, first, last], axis=2)
    whole = jnp.repeat(c.unbroken(c.whole)[..., 0], width, axis=2)
    return by_chunk(rows, batch), by_chunk(whole, batch)


def by_chunk(x, batch):
    """(B N, ...) -> (B, N, ...)."""
    return x.reshape(batch, -1, *x.shape[1:])


def some_at_a_time(function, arrays, size):
    """`function` of each chunk's arrays; their tokens hold `size` keys."""
    at_once = max(1, PREPARED // (CHUNK * size))
    return jax.lax.map(lambda x: function(*x), arrays, batch_size=at_once)


def chunk_of(q, k, log, reset):
    """`xla.Chunk` of one chunk: q (C, Gq, K), k (C, Gk, K), log (C, H, K), reset (C,)."""
    q, k, log = (by_head(x[None]) for x in (q, k, log))
    return xla.Chunk(q, k, k, log, None if reset is None else reset[None], log)


def prepare(q, k, log, reset):
    """One chunk's (q, k) decayed to its ends, scores, rows, whole, for a vector decay."""
    c = chunk_of(q, k, log, reset)
    tokens = c.only("first", c.q * c.from_start), c.only("last", c.k * c.to_end)
    tokens = (jnp.swapaxes(x[0], 0, 1).astype(jnp.bfloat16) for x in tokens)
    one = jnp.ones_like(c.from_start[..., :1])
    rows = jnp.stack([c.only(where, one)[0, ..., 0] for where in ("first", "last")], axis=1)
    return *tokens, c.scores()[0].astype(jnp.bfloat16), rows, c.unbroken(c.whole)[0, ..., 0]


@jax.jit
def vector(q, k, log, reset):
    """(q, k) decayed, rows, whole and scores, of logs (B, T, H, K)."""
    arrays = split(q), split(k), split(log), None if reset is None else split(reset)
    *tokens, scores, rows, whole = some_at_a_time(prepare, arrays, log.shape[2] * log.shape[3])
    tokens = (x.reshape(log.shape) for x in tokens)
    return *tokens, *(by_chunk(x, log.shape[0]) for x in (rows, whole, scores))


def _prepared(q, k, log, reset):
    """What the kernels take: q, k, rows, whole and scores, or None where they compute them."""
    if log.shape[3] > 1:
        return vector(q, k, log, reset)
    return q, k, *scalar(log, reset, q.shape[3]), None


def _forward(device, q, k, v, log, state, reset, keep=True):
    *tokens, rows, whole, scores = _prepared(q, k, log, reset)
    out = walk(device, *tokens, v, rows, whole, state, scores, keep=keep)
    return tuple(out[:2]), (q, k, v, log, reset, *out[2:])


def _backward(device, residuals, cotangents):
    q, k, v, log, reset, before = residuals
    dy, d_final = cotangents
    decayed_q, decayed_k, rows, whole, scores = _prepared(q, k, log, reset)
    dv, d_state, after = walk(
        device, decayed_k, decayed_q, dy, rows, whole, d_final, scores, reverse=True, keep=True
    )
    given = scores is not None
    dq, dk, through, inside = gradients(device, q, k, v, dy, rows, before, after, given=given)
    pull = vector_pull if given else scalar_pull
    dq, dk, d_log = pull(q, k, log, reset, dq, dk, whole * through, inside)
    return _collect(dq, q), _collect(dk, k), _collect(dv, v), d_log, d_state, None


@jax.jit
def scalar_pull(q, k, log, reset, dq, dk, through, inside):
    """Gradients of q, k and the logs; the kernel has done the first two."""
    read, gave, at_start, at_end = (
        rearrange(inside, "b n h r c -> r (b n) h c 1")[r] for r in range(4)
    )
    through = rearrange(through, "b n h k -> (b n) h 1 k")
    d_log = decays(log, reset).decay_pull(read - gave, at_start, at_end, through)
    return dq, dk, by_head(d_log).reshape(log.shape)


@jax.jit
def vector_pull(q, k, log, reset, dq, dk, through, d_scores):
    """Gradients of q, k and the logs from those of the scores and by way of the states."""

    def pull(q, k, log, reset, dq, dk, through, d):
        c = chunk_of(q, k, log, reset)
        dq, dk = (by_head(x[None]).astype(log.dtype) for x in (dq, dk))
        d = d[None].astype(log.dtype)
        through = through[None, :, None]
        dq_start, dk_end, own = dq * c.from_start, dk * c.to_end, c.own(d)
        dq, dk = c.scores_pull(d, jnp.swapaxes(d, 2, 3))
        inside = c.q * dq - c.k * dk
        d_log = c.decay_pull(inside, c.q * dq_start, c.k * dk_end, through)
        out = dq + dq_start + own * c.k, dk + dk_end + own * c.q, d_log
        return tuple(by_head(x)[0] for x in out)

    tokens = (None if x is None else split(x) for x in (q, k, log, reset, dq, dk))
    chunks = (x.reshape(-1, *x.shape[2:]) for x in (through, d_scores))
    out = some_at_a_time(pull, (*tokens, *chunks), log.shape[2] * log.shape[3])
    return tuple(x.reshape(log.shape) for x in out)


def _collect(d, x):
    """Sum a gradient (B, T, H, ...) over the heads that share x."""
    d = d.reshape(*x.shape[:3], -1, x.shape[3])
    return jnp.sum(d, axis=3, dtype=jnp.float32).astype(x.dtype)


def _values(device, q, k, v, log, state, reset):
    return _forward(device, q, k, v, log, state, reset, keep=False)[0]


_chunkwise = jax.custom_vjp(_values, nondiff_argnums=(0,))
_chunkwise.defvjp(keep.rule(_forward), _backward)
