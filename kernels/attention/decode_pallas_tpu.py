"""One query a row against a cache, for TPUs: the cache is read once, as it lies.

A tile has some keys of every group: all heads of a row meet all of them, and a mask keeps each to
its group. The extra products are free, for the matrix unit takes as long for the few heads of one
group. A worker is a TPU core; `decode` deals the tiles. The bytes are the cache's, the least there
is, if it lies as (B, G, S, K), of which the arguments are transposes; others are copied first, and
keys of 64 are padded (docs/kernels.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from .. import pallas, tuned
from ..monoid import LOWEST
from ..pallas import dot
from . import decode, tiles
from .pallas_tpu_tiles import Keys

TILE = 256  # keys at a time; of every group
BYTES = 4 << 20  # of a tile's keys and values, which are held several times over
STEPS = 65_536  # 8 bytes each, of a scalar memory of a megabyte
LIVE, STARTS, TILES = 1, 2, 4  # what a step's number is made of: two flags and its tile
CORES = {"TPU v4": 2, "TPU v5p": 2, "TPU v5": 2}  # that share a program; one where not named


def refuse(q, k, v, block):
    """Why not, or None: a tile lies in VMEM, and what each worker does in scalar memory."""
    if not _most(q, k, v):
        return f"its tiles have 16 keys at least, which {k.shape[2]} groups are too many for"
    if block is not None and (reason := _refuse(q, k, v, block)):
        return reason
    steps = k.shape[0] * -(-k.shape[1] // _tile(q, k, v, block))
    if steps + k.shape[0] > STEPS:
        return f"it takes up to {STEPS} rows and tiles of keys, not {steps + k.shape[0]}"
    return None


def _refuse(q, k, v, block):
    most = _most(q, k, v)
    if block % 16 or block > most:
        return f"its tiles of this many groups are multiples of 16 keys up to {most}, not {block}"
    return None


def _most(q, k, v):
    """How many keys of all groups a tile may hold."""
    a_key = k.shape[2] * (k.shape[3] + v.shape[3]) * jnp.result_type(q, k, v).itemsize
    return BYTES // a_key // 16 * 16


def _tile(q, k, v, block):
    default = min(TILE, _most(q, k, v))
    about = {"G": k.shape[2]} | tiles.features(q, v)
    fits = partial(_refuse, q, k, v)
    block = block or tuned.size("decode", "pallas_tpu", default, fits, **about)
    return min(block, -(-k.shape[1] // 16) * 16)


def _kernel(scale, exact, output, steps, first, last, *refs):
    from jax.experimental import pallas as pl

    q, k, v, index, group, groups, m, u, w = refs
    at = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

    @pl.when(steps[at] & STARTS > 0)
    def _():
        m[...] = jnp.full_like(m, LOWEST)
        u[...] = jnp.zeros_like(u)
        w[...] = jnp.zeros_like(w)

    @pl.when(steps[at] & LIVE > 0)
    def _():
        row = output[at]
        keys = Keys(*(x[...].reshape(-1, x.shape[-1]) for x in (k, v)), index)
        see = (first[row] <= keys.index) & (keys.index <= last[row]) & (keys.index >= 0)
        see &= group[...] == groups[...]
        s = jnp.where(see, scale * dot(q[...], keys.as_nan, "hk,sk->hs", exact), LOWEST)
        top = jnp.maximum(m[...], jnp.max(s, axis=1, keepdims=True))
        p = pallas.rounded(jnp.where(see, jnp.exp(s - top), 0), exact)
        fade = jnp.exp(m[...] - top)
        m[...] = top
        u[...] = fade * u[...] + jnp.sum(p, axis=1, keepdims=True)
        w[...] = fade * w[...] + dot(p, keys.v, "hs,sv->hv", exact)


def attention(device, scale, block, dtype, q, k, v, first, last, kv_index):
    """y (B, 1, H, V) and lse (B, 1, H) of queries (B, 1, H, K)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (_, _, heads, K), groups, V = q.shape, k.shape[2], v.shape[3]
    size = _tile(q, k, v, block)
    index = tiles.cut(kv_index, size, -1)
    extent, (first, last) = tiles.extent(index), (first[:, 0], last[:, 0])
    low, high = tiles.spans(extent, first[None], last[None])
    most, workers = index.shape[0], CORES.get(device.kind, 1)
    plan = decode.partition(low[:, 0], high[:, 0], workers, most)

    index = repeat(index, "n b s -> b n 1 (g s)", g=groups)
    group = np.repeat(np.arange(groups, dtype=np.int32), size)[None]
    mine = np.repeat(np.arange(groups, dtype=np.int32), heads // groups)[:, None]

    count = np.int32(plan.output.shape[1])

    def row(w, s, output, *_):
        return output[w * count + s], 0, 0

    def keys(w, s, output, steps, *_):
        return output[w * count + s], 0, jax.lax.div(steps[w * count + s], np.int32(TILES)), 0

    def index_of(*at):
        row, _, tile, _ = keys(*at)
        return row, tile, 0, 0

    def part(w, s, output, *_):
        return output[w * count + s] + w, 0, 0

    def whole(w, s, *_):
        return 0, 0

    span = size * groups
    call = pallas.tpu_call(
        partial(_kernel, scale, q.dtype == jnp.float32),
        device,
        semantics=("parallel", "arbitrary"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=plan.output.shape,
            in_specs=[
                pl.BlockSpec((None, heads, K), row),
                pl.BlockSpec((None, groups, size, K), keys),
                pl.BlockSpec((None, groups, size, V), keys),
                pl.BlockSpec((None, None, 1, span), index_of),
                pl.BlockSpec((1, span), whole),
                pl.BlockSpec((heads, 1), whole),
            ],
            out_specs=[pl.BlockSpec((None, heads, n), part) for n in (1, 1, V)],
        ),
        out_shape=[pallas.shape(plan.used.shape[0], heads, n) for n in (1, 1, V)],
    )
    steps = plan.tile * TILES + jnp.where(plan.live, LIVE, 0) + jnp.where(plan.starts, STARTS, 0)
    tables = plan.output.ravel(), steps.ravel().astype(jnp.int32), first, last
    # The last tile may reach past the end: what is there has no index, so that nobody sees it.
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as a cache lies
    m, u, w = call(*tables, q[:, 0], k, v, index, group, mine)
    m, u, w = decode.merge(plan, (m[..., 0], u[..., 0], w))
    y = jnp.where(u[..., None] == 0, 0, w / u[..., None])
    return y[:, None].astype(dtype), (m + jnp.log(u))[:, None]
