"""How a call of attention is cut into tiles, which its masks let meet, and sums of one tile."""

import jax.numpy as jnp
from einops import rearrange

END = jnp.iinfo(jnp.int32).max


def features(q, v):
    """What a measured number of tokens of a tile depends on."""
    return {"K": q.shape[3], "V": v.shape[3], "dtype": q.dtype.name}


def even(length, block):
    """The size of the fewest tiles of at most `block`, as equal as they can be."""
    return -(-length // -(-length // block))


def cut(x, block, fill=0):
    """(B, T, ...) -> (tiles, B, block, ...), the last tile filled up."""
    rest = -x.shape[1] % block
    if rest:
        padding = [(0, rest) if axis == 1 else (0, 0) for axis in range(x.ndim)]
        x = jnp.pad(x, padding, constant_values=fill)
    return rearrange(x, "b (n t) ... -> n b t ...", t=block)


def intervals(first, last, block):
    """Tiles of the queries' intervals, those of the filling empty, and their extents."""
    first, last = cut(first, block, END), cut(last, block, -1)
    return (first, last), (first.min(-1), last.max(-1))


def extent(index):
    """Least and greatest index of a tile's keys, empty slots not counted."""
    return jnp.where(index < 0, END, index).min(-1), index.max(-1)


def span(low, high, first, last):
    """The range of tiles, extents (tiles, B), that overlap an interval (B,) in any row."""
    live = ((low <= last) & (high >= first)).any(-1)
    return jnp.argmax(live), jnp.where(live.any(), live.size - jnp.argmax(live[::-1]), 0)


def spans(extent, first, last):
    """For each tile of one side the range of tiles of the other that it meets: two (B, tiles)."""
    live = (extent[0][None] <= last[:, None]) & (extent[1][None] >= first[:, None])
    low = jnp.argmax(live, axis=1).astype(jnp.int32)
    high = live.shape[1] - jnp.argmax(live[:, ::-1], axis=1).astype(jnp.int32)
    high = jnp.where(live.any(axis=1), high, low)
    return low.T, high.T


def dot(equation, x, y):
    """A matmul accumulated in at least float32, and not in less precision than its inputs."""
    exact = jnp.promote_types(jnp.float32, x.dtype)
    precision = "highest" if x.dtype == exact else "default"
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=exact)


def see(first, last, index):
    """(B, 1, 1, T, S): what intervals of queries (B, T) let through of keys (B, S)."""
    index = index[:, None, :]
    seen = (first[:, :, None] <= index) & (index <= last[:, :, None]) & (index >= 0)
    return seen[:, None, None]
