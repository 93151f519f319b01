"""The fixed-query softmax scan for Hopper GPUs: one walk along the chunks, the mean in registers.

What is one number a token XLA makes: the scores and their gradient's way back to q and k, the
maxima m, the normalisers u and the cotangents of both that pass from chunk to chunk. The kernels
(`fixed_query_pallas_gpu_kernels`) see the values. In a chunk that begins with the mean y_0 = w / u,
    y_t = sum_s a_ts v_s + share_t y_0,  a_ts = e^(s_s - m_t) / u_t,  share_t = e^(m - m_t) u / u_t.
All weights are at most 1. The backward is that of `fixed_query_xla.py` times u: with dy_t, to which
the last token of a chunk adds the cotangent of what follows, and d the cotangent of log u there,
    dv_s = sum_t a_ts dy_t,   ds_s = sum_t a_ts dy_t . (v_s - y_t) + a_(last)s d.

Bytes a token and head of V values: the forward reads 2 V and writes 2 V, the least there is, and
V / 16 of means of chunks; 20 of numbers are read once for each 64 values. The backward moves 6 V,
the least, V / 16 of means, and V / 8 + 20 V / 64 of numbers. What XLA does is some tens of bytes
beside the keys. Operations: 4 C V forward and 8 C V backward, of which half is of use; y takes two
products, for with weights of bfloat16 v_s - y_t would be off by what they do not sum to.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from .. import keep, monoid, pallas
from ..dispatch import late
from ..monoid import LOWEST

CHUNK, WIDEST = 64, 256

walk = late(f"{__package__}.fixed_query_pallas_gpu_kernels", "walk")
walk_back = late(f"{__package__}.fixed_query_pallas_gpu_kernels", "walk_back")


def refuse(q, k, v, *rest):
    """Why not, or None."""
    *_, chunk = rest
    if reason := pallas.no_hopper(q, k, v):
        return reason
    if chunk not in (None, CHUNK):
        return f"its chunks are of {CHUNK} tokens, not {chunk}"
    if v.shape[3] % CHUNK or not 0 < v.shape[3] <= WIDEST:
        return f"its value widths are multiples of {CHUNK} up to {WIDEST}, not {v.shape[3]}"
    return None


def fixed_query(q, k, v, scale, state, reset, chunk):
    """The public function's arguments after its checks."""
    del chunk
    time, groups = k.shape[1:3]

    def pad(x, fill=0.0):
        padding = [(0, 0), (0, -time % CHUNK)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding, constant_values=fill)

    by_group = rearrange(q.astype(jnp.float32), "(g r) k -> g r k", g=groups)
    s = scale * jnp.einsum("grk,btgk->btgr", by_group, k.astype(jnp.float32), precision="highest")
    s = rearrange(pad(s, LOWEST), "b (n c) g r -> b n (g r) c", c=CHUNK)
    if reset is not None:
        reset = rearrange(pad(reset), "b (n c) -> b n 1 c", c=CHUNK)
    y, state = _scan(pallas.target(), s, pad(v), state, reset)
    return y[:, :time], state


class Numbers:
    """What there is one of a token, (B, N, H, C), or of a chunk, (B, N, H, 1)."""

    def __init__(self, s, reset, m, u):
        place = jnp.arange(CHUNK, dtype=jnp.int32)
        first = jnp.zeros((1, 1, 1, CHUNK), jnp.int32)
        begins = jnp.zeros(s.shape[:2], bool)
        if reset is not None:
            first = jax.lax.cummax(jnp.where(reset, place, 0), axis=3)
            begins = reset.any((2, 3))
        keep = True if reset is None else jnp.cumsum(reset, axis=3, dtype=jnp.int32) == 0
        see = (place <= place[:, None]) & (place >= first[..., None])
        scores = jnp.where(see, s[..., None, :], LOWEST)
        top = scores.max(axis=-1)  # of a token's own document in its chunk; then with what came
        mass = jnp.where(see, jnp.exp(scores - top[..., None]), 0).sum(axis=-1)
        self.came_m, self.came_u = _before(begins, top[..., -1], mass[..., -1], m, u)
        self.m = jnp.maximum(top, jnp.where(keep, self.came_m, LOWEST))
        fade = jnp.where(keep, jnp.exp(self.came_m - self.m), 0)
        self.u = mass * jnp.exp(top - self.m) + times(fade, self.came_u)
        self.share = times(fade, unit(self.came_u) / self.u)
        self.end = jnp.where(see[..., -1, :], jnp.exp(s - self.m[..., -1:]), 0) / self.u[..., -1:]
        self.largest = see[..., -1, :] & (s == self.m[..., -1:])
        self.came = (fade[..., -1:] > 0) & (self.came_m == self.m[..., -1:])
        first = jnp.broadcast_to(first, s.shape).astype(s.dtype)
        self.rows = jnp.stack([s, self.m, first, 1 / self.u, self.share], axis=3)


def times(factor, x):
    """factor * x, and zero where the factor is zero, whatever x is."""
    return jnp.where(factor == 0, jnp.float32(0), factor * x)


def unit(u):
    """The normaliser, or 1 for that of nothing."""
    return jnp.where(u == 0, 1, u)


def _before(begins, top, mass, m, u):
    """The maximum and normaliser before each chunk: (B, N, H, 1)."""

    def state(m, u):
        return m, u, jnp.zeros((*m.shape, 0), m.dtype)  # no values

    flag, top, mass = (jnp.swapaxes(x, 0, 1) for x in (begins, top, mass))
    rule, none = monoid.resettable(monoid.SOFTMAX), jnp.zeros_like(begins[:, 0])
    _, after = monoid.associative(rule, (flag, state(top, mass)), (none, state(m, u)))
    pairs = zip((m, u), after[:2], strict=True)
    return [jnp.swapaxes(jnp.concatenate([x[None], y[:-1]]), 0, 1)[..., None] for x, y in pairs]


def _carried(factor, given, last):
    """x_(n-1) = factor_n x_n + given_n from the last chunk to the first: (every x_n, x before)."""

    def combine(later, earlier):
        return times(earlier[0], later[0]), times(earlier[0], later[1]) + earlier[1]

    factor, given = jax.lax.associative_scan(combine, (factor, given), axis=1, reverse=True)
    x = times(factor, last[:, None]) + given
    return jnp.concatenate([x[:, 1:], last[:, None]], axis=1), x[:, 0]


def _forward(device, s, v, state, reset):
    m, u, w = state
    numbers = Numbers(s, reset, m, u)
    mean = w / unit(u)[..., None]
    y, after = walk(device, v, numbers.rows, mean)
    m, u = (x[:, -1, :, -1] for x in (numbers.m, numbers.u))
    final = m, u, u[..., None] * after[:, -1]
    return (y, final), (s, v, reset, state, after)


def _backward(device, residuals, cotangents):
    s, v, reset, (m, u, w), after = residuals
    dy, (dm, du, dw) = cotangents
    numbers = Numbers(s, reset, m, u)
    mean = w / unit(u)[..., None]
    before = jnp.concatenate([mean[:, None], after[:, :-1]], axis=1)

    # Between chunks dw goes as d_mean = u dw, du as d_log = u (du + dw . w / u) and dm as d_top:
    # what a reader of the state sees of its maximum besides through u and w, which follow it.
    final = numbers.u[:, -1, :, -1]
    d_log = final * (du + (dw * after[:, -1]).sum(-1))
    d_top, d_mean = dm - d_log, final[..., None] * dw
    dv, d_mean, inside = walk_back(device, v, dy, numbers.rows, before, d_mean)
    ds, passed = inside.sum(3)[..., 0, :], inside.sum(3)[..., 1, :]

    share = numbers.share
    given = times(share, passed).sum(-1, keepdims=True)
    d_logs, d_log = _carried(share[..., -1:], given, d_log[..., None])
    # Where several scores are the maximum, each takes half of what those after it leave.
    count = jnp.cumsum(numbers.largest, axis=3, dtype=jnp.int32)
    total = count[..., -1:]
    factor = jnp.where(numbers.came, jnp.exp2(-total.astype(s.dtype)), 0)
    d_tops, d_top = _carried(factor, jnp.zeros_like(factor), d_top[..., None])
    earlier = (count > 1) | numbers.came
    halves = jnp.exp2((count - total - earlier).astype(s.dtype))
    ds += times(numbers.end, d_logs) + jnp.where(numbers.largest, d_tops * halves, 0)

    d_mass, dw = d_log[..., 0] / unit(u), d_mean / unit(u)[..., None]
    du = d_mass - (dw * mean).sum(-1)
    dv = rearrange(dv, "b t (g r) v -> b t g r v", g=v.shape[2])
    dv = dv.sum(axis=3, dtype=jnp.float32).astype(v.dtype)
    return ds, dv, (d_top[..., 0] + u * d_mass, du, dw), None


def _values(device, s, v, state, reset):
    return _forward(device, s, v, state, reset)[0]


_scan = jax.custom_vjp(_values, nondiff_argnums=(0,))
_scan.defvjp(keep.rule(_forward), _backward)
