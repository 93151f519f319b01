"""FlashAttention-2 for Hopper GPUs: an online softmax in registers, a backward in two passes.

The kernels (`pallas_gpu_kernels`) walk the tiles that the masks let meet, whose ranges XLA computes
beforehand; tiles that are seen whole are not masked. dq is made by tiles of queries, dk and dv by
tiles of keys over all heads that read them, so that nothing is added in an order that varies.

Non-finite numbers are kept as in `xla.py`. XLA makes the copies: a row of keys or values that holds
one is nan where the product's result is masked and zero where the product sums over the masked
axis; such a query is zero, and what its weights are made from, its log-sum-exp, is nan.

Operations for a query and a key that it sees: 2 K + 2 V forward, the least there is; 8 K + 6 V
backward, for the scores and the gradients of the weights are computed in both passes, against
6 K + 4 V; 10 K + 6 V where K + V > 256. Under a causal mask at T = 8192 tiles add 2 % to that.
Bytes: q, dy and what is written move once, and in the backward q and dy once more for each tile of
128 keys (64 where K + V > 256); keys and values once for each 128 queries of each head, out of the
L2 cache where they fit. XLA's copies read k and v twice and write each once, in the backward k
twice. Shared memory, of 227 KiB, for K = V = 64, 128, 256: 101, 181, 213 KiB forward, 83, 147,
211 KiB in each pass of the backward.
"""

from functools import partial

import jax
import jax.numpy as jnp

from .. import dispatch, keep, pallas, tuned
from . import tiles, xla

OWN, WIDEST = 128, 256  # tokens of the tile that a program owns; features of a head
MOST = 64  # heads of a group that a decoding step takes
LOG2E = 1.4426950408889634

forward, rows, columns = (
    dispatch.late(f"{__package__}.pallas_gpu_kernels", name)
    for name in ("forward", "rows", "columns")
)
decode = dispatch.late(f"{__package__}.decode_pallas_gpu", "attention")


def refuse(q, k, v, first, last, kv_index, scale, block, dtype):
    """Why not, or None."""
    del first, last, kv_index, dtype
    return _refuse(q, k, v, scale, block)


def refuse_gradients(q, k, v, dy, lse, delta, first, last, kv_index, scale, block):
    """Why not, or None."""
    del dy, lse, delta, first, last, kv_index
    return _refuse(q, k, v, scale, block)


def _refuse(q, k, v, scale, block):
    if reason := pallas.no_hopper(q, k, v):
        return reason
    for name, width in (("key", k.shape[3]), ("value", v.shape[3])):
        if width % 64 or not 0 < width <= WIDEST:
            return f"its {name} widths are multiples of 64 up to {WIDEST}, not {width}"
    if not scale > 0:
        return f"its scale is positive, not {scale}"
    return None if block is None else _wrong(q, k, v, block)


def _wrong(q, k, v, block):
    if block not in _blocks(q, k, v):
        return f"its tiles are of {' or '.join(map(str, _blocks(q, k, v)))} keys, not {block}"
    return None


def _blocks(q, k, v):
    """Keys that a tile of the forward may hold: what fits the shared memory."""
    if _decodes(q, k):
        return (64,)
    return (64, 128) if k.shape[3] + v.shape[3] <= 256 else (64,)


def _decodes(q, k):
    return q.shape[1] == 1 and q.shape[2] <= MOST * k.shape[2]


def attention(q, k, v, first, last, kv_index, scale, block, dtype):
    """Key s is seen by query t iff first_t <= kv_index_s <= last_t. Saves y and lse, O(T)."""
    default, about, fits = _blocks(q, k, v)[-1], tiles.features(q, v), partial(_wrong, q, k, v)
    if not _decodes(q, k):
        block = block or tuned.size("attention", "pallas_gpu", default, fits, **about)
    how = dispatch.target(), float(scale), jnp.dtype(dtype)
    return _attention((*how, block), q, k, v, first, last, kv_index)


def gradients(q, k, v, dy, lse, delta, first, last, kv_index, scale, block):
    """What these keys contribute to the gradients to q, k and v; see `attention_gradients`."""
    del block  # of the forward
    how = dispatch.target(), float(scale), jnp.dtype(jnp.float32)
    return _gradients(how, q, k, v, dy, lse, delta, first, last, kv_index)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, first, last, kv_index):
    return _forward(how, q, k, v, first, last, kv_index)[0]


def _forward(how, q, k, v, first, last, kv_index):
    (device, scale, dtype, block), time = how, q.shape[1]
    if _decodes(q, k):
        out = decode(device, scale, dtype, q, k, v, first, last, kv_index)
        return out, (q, k, v, first, last, kv_index, *out)
    bad = _unsound(k, v)
    masks = Masks(first, last, kv_index)
    written = dtype if dtype in (jnp.float32, jnp.bfloat16) else jnp.float32
    y, lse = forward(
        device,
        scale,
        written,
        whole(q),
        whole(jnp.where(bad, jnp.nan, k)),
        whole(jnp.where(bad, 0, v)),
        *masks.arrays,
        *masks.by_queries(OWN, block),
    )
    out = y[:, :time].astype(dtype), jnp.swapaxes(lse, 1, 2)[:, :time]
    return out, (q, k, v, first, last, kv_index, *out)


def _gradients(how, q, k, v, dy, lse, delta, first, last, kv_index):
    device, scale, dtype = how
    time, source, wide = q.shape[1], k.shape[1], q.shape[3] + v.shape[3] > 256
    dy = dy.astype(q.dtype)
    bad_key, bad = _unsound(k, v), _unsound(q, dy) | ~jnp.isfinite(delta)[..., None]
    masks = Masks(first, last, kv_index)
    q, dy = (whole(jnp.where(bad, 0, x)) for x in (q, dy))
    k_nan, v = (whole(jnp.where(bad_key, jnp.nan, x)) for x in (k, v))
    numbers = jnp.where(bad, jnp.nan, LOG2E * lse[..., None]), jnp.where(bad, 0, delta[..., None])
    numbers = jnp.moveaxis(whole(jnp.concatenate(numbers, axis=-1)), 1, 3)
    rest = v, dy, numbers, *masks.arrays
    sizes = OWN, 32 if wide else 64
    k = whole(jnp.where(bad_key, 0, k))
    dq = rows(device, scale, dtype, q, k, *rest, *masks.by_queries(*sizes))
    sizes = 64 if wide else OWN, 64
    dk, dv = columns(device, scale, dtype, q, k_nan, *rest, *masks.by_keys(*sizes))
    return dq[:, :time], dk[:, :source], dv[:, :source]


def _backward(how, residuals, cotangents):
    q, k, v, first, last, kv_index, y, lse = residuals
    dy, dlse = cotangents
    slope = q, k, v, dy, lse, xla.delta(y, dy, dlse), first, last, kv_index
    return *_gradients((*how[:2], q.dtype), *slope), None, None, None


_attention.defvjp(keep.rule(_forward), _backward)


def whole(x, fill=0):
    """(B, T, ...) with T filled up to whole tiles."""
    padding = [(0, -n % OWN if axis == 1 else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, padding, constant_values=fill)


def _unsound(*arrays):
    """Which rows hold a non-finite number in any array, (B, T, heads, 1)."""
    return ~jnp.logical_and(*(jnp.isfinite(x).all(-1, keepdims=True) for x in arrays))


class Masks:
    """Who sees what, as the kernels read it; see `pallas_gpu_kernels` for the arrays."""

    def __init__(self, first, last, kv_index):
        self.first = whole(jnp.maximum(first, 0), tiles.END)
        self.last, self.index = whole(last, -1), whole(kv_index, -1)
        self.arrays = jnp.stack([self.first, self.last], axis=1), self.index

    def queries(self, size):
        """Of each tile of queries, (tiles, B): the extent, and what every query of it sees."""
        (first, last), extent = tiles.intervals(self.first, self.last, size)
        return extent, (first.max(-1), last.min(-1))

    def keys(self, size):
        """Of each tile of keys: the extent without empty slots, and with them."""
        index = tiles.cut(self.index, size)
        return tiles.extent(index), (index.min(-1), index.max(-1))

    def by_queries(self, own, other):
        """(ranges, ends) for tiles of `own` queries that meet tiles of `other` keys."""
        return _meet(self.queries(own), self.keys(other))

    def by_keys(self, own, other):
        """The same for tiles of `own` keys that meet tiles of `other` queries."""
        return _meet(self.keys(own), self.queries(other))


def _meet(own, other):
    (extent, ends), (other_extent, other_ends) = own, other
    low, high = tiles.spans(other_extent, *extent)
    ranges = jnp.stack([low, high, *(x.T for x in ends)], axis=-1)
    return ranges, jnp.stack([x.T for x in other_ends], axis=-1)
