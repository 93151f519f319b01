"""Attention's kernels for Hopper GPUs: interpreted on tiny shapes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import attention
from scanax.kernels.attention import attention_gradients, decode_pallas_gpu, delta
from scanax.kernels.dispatch import on
from support.compare import rms
from support.targets import HOPPER, interpreted_hopper

INTERPRETED = interpreted_hopper(detect_races=True)
B, T, S, H, G, K, V = 1, 100, 140, 2, 1, 64, 64  # three tiles of 64 keys
NAMES, BAR = ("q_index", "q_start", "kv_index"), 0.005


def draw(rng, batch=B, time=T, source=S, heads=H, groups=G, key=K, value=V):
    sizes = (batch, time, heads, key), (batch, source, groups, key), (batch, source, groups, value)
    qkv = [jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes]
    dy = jnp.asarray(rng.normal(size=(batch, time, heads, value)), jnp.bfloat16)
    return qkv, (dy, jnp.asarray(rng.normal(size=(batch, time, heads)), jnp.float32))


@cache
def pulled(implementation):
    """(y, lse) and gradients, of a mask that is data as a cache gives it."""

    def call(qkv, cotangents, q_index, q_start, kv_index):
        mask = dict(zip(NAMES, (q_index, q_start, kv_index), strict=True))
        run = partial(attention, return_lse=True, implementation=implementation, **mask)
        out, pull = jax.vjp(run, *qkv)
        return out, pull(cotangents)

    return jax.jit(call)


def interpreted(qkv, cotangents, mask):
    with on(INTERPRETED):
        return pulled("pallas_gpu")(qkv, cotangents, *mask)


@cache
def drawn(name):
    """Inputs, cotangents and results of one mask."""
    qkv, (dy, dlse) = draw(np.random.default_rng(1))
    dlse *= seen(*MASKS[name]).any(-1)[..., None]  # the -inf of an empty row is a constant
    return qkv, (dy, dlse), interpreted(qkv, (dy, dlse), MASKS[name])


def expected(qkv, cotangents, mask):
    """In float64, of the same rounded inputs."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (qkv, cotangents))
        return jax.tree.map(np.asarray, pulled("reference")(*exact, *mask))


def masks(rng):
    """name -> (q_index, q_start, kv_index)."""
    index, slots = np.arange(T) + S - T, np.arange(S)
    holes = np.where(rng.random(S) < 0.4, -1, rng.permutation(S))
    start = np.where(rng.random(T) < 0.3, 10 * S, index + 60)
    return {
        "window in a ring, some see nothing": (index + 100, start, np.roll(slots + 100, 20)),
        "documents and holes": (index, np.minimum(index // 50 * 50, index), holes),
    }


MASKS = {
    name: [jnp.asarray(x, jnp.int32)[None] for x in mask]
    for name, mask in masks(np.random.default_rng(0)).items()
}


def seen(q_index, q_start, kv_index):
    key = kv_index[:, None, :]
    return np.asarray((q_start[..., None] <= key) & (key <= q_index[..., None]) & (key >= 0))


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    qkv, cotangents, ((y, lse), gradients) = drawn(name)
    (true, true_lse), true_gradients = expected(qkv, cotangents, MASKS[name])
    some = seen(*MASKS[name]).any(-1)
    assert y.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(~some[..., None], lse.shape))
    assert not np.asarray(y)[~some].any()
    rms(np.where(some[..., None], lse, 0), np.where(some[..., None], true_lse, 0), 1e-5)
    rms((y, gradients), (true, true_gradients), BAR)


def test_non_finite_numbers_reach_what_may_see_them():
    """A key in each of the first two documents, queries in the third, one slot that is empty."""
    mask = MASKS["documents and holes"]
    see, held = seen(*mask), np.asarray(mask[2][0])
    (q, k, v), (dy, dlse), clean = drawn("documents and holes")
    low, high = (int(np.flatnonzero((held >= i) & (held < i + 9))[0]) for i in (45, 91))
    empty = int(np.flatnonzero(held < 0)[-1])
    bad_key, bad_query = np.zeros((B, S), bool), np.zeros((B, T), bool)
    bad_key[0, [low, high, empty]] = bad_query[0, [80, 90]] = True
    k = k.at[0, low, :, 2].set(jnp.nan).at[0, empty].set(-jnp.inf)
    v = v.at[0, high, :, 1].set(jnp.inf)
    q, dy = q.at[0, 80, :, 0].set(jnp.inf), dy.at[0, 90, :, 0].set(jnp.nan)
    got = interpreted((q, k, v), (dy, dlse), mask)

    bad_value = (see & bad_key[:, None]).any(-1)
    bad_value[0, 80] = True
    bad_row = bad_value | (bad_query & see.any(-1))
    reached = (see & bad_row[..., None]).any(1)
    assert bad_row.any() and not bad_row.all() and reached.any() and not reached.all()
    where = (bad_value, bad_value), (bad_row, reached, reached)
    for x, true, nan in zip(*map(jax.tree.leaves, (got, clean, where)), strict=True):
        x, true = np.asarray(x, np.float32), np.asarray(true, np.float32)
        assert not np.isfinite(x[nan]).all(axis=tuple(range(1, x[nan].ndim))).any()
        np.testing.assert_array_equal(x[~nan], true[~nan])


@pytest.mark.parametrize(
    ("sizes", "ahead"),
    [((2, 70, 70, 1, 1, 128, 64), 0), ((1, 131, 70, 1, 1, 192, 128), 70)],
    ids=["128-64 causal", "192-128 whole"],
)
def test_other_widths(sizes, ahead):
    """Of more than 256 numbers a key, one warpgroup makes dk and the other dv."""
    qkv, cotangents = draw(np.random.default_rng(3), *sizes)
    batch, time, source = sizes[:3]
    query = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    key = jnp.broadcast_to(jnp.arange(source, dtype=jnp.int32), (batch, source))
    mask = query + ahead, 0 * query, key
    rms(interpreted(qkv, cotangents, mask), expected(qkv, cotangents, mask), BAR)


def test_gradients_of_parts_of_the_keys_sum_to_the_whole():
    q_index, q_start, kv_index = mask = MASKS["documents and holes"]
    (q, k, v), (dy, dlse) = draw(np.random.default_rng(4))
    (y, lse), true = expected((q, k, v), (dy, dlse), mask)
    y, lse = jnp.asarray(y, jnp.float32), jnp.asarray(lse, jnp.float32)
    how = {"q_index": q_index, "q_start": q_start, "implementation": "pallas_gpu"}
    run = jax.jit(partial(attention_gradients, **how))
    with on(INTERPRETED):
        parts = [
            run(q, k[:, s], v[:, s], dy, lse, delta(y, dy, dlse), kv_index=kv_index[:, s])
            for s in (slice(0, 70), slice(70, 140))
        ]
    (dq_0, *first), (dq_1, *second) = parts
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(parts))
    got = dq_0 + dq_1, *(jnp.concatenate(x, axis=1) for x in zip(first, second, strict=True))
    rms(got, true, BAR)


@pytest.mark.parametrize(
    ("sizes", "cause"),
    [((3, 1, 200, 4, 2, 64, 64), "key"), ((2, 1, 200, 2, 1, 192, 128), "value")],
    ids=["64-64", "192-128"],
)
def test_one_query_a_row(sizes, cause, monkeypatch):
    """Workers across rows, holes, a row that sees nothing, bad numbers out of sight and in it."""
    monkeypatch.setitem(decode_pallas_gpu.CORES, INTERPRETED.kind, 1)
    rng, (batch, _, source) = np.random.default_rng(6), sizes[:3]
    (q, k, v), _ = draw(rng, *sizes)
    q_index = np.array([[199], [60], [130]])[:batch]
    held = np.where(rng.random((batch, source)) < 0.3, -1, np.arange(source))
    held[2:] = -1
    mask = [jnp.asarray(x, jnp.int32) for x in (q_index, np.maximum(q_index - 150, 0), held)]
    run = partial(attention, return_lse=True, **dict(zip(NAMES, mask, strict=True)))
    true, true_lse = jax.jit(partial(run, implementation="reference"))(
        *(x.astype(jnp.float32) for x in (q, k, v))
    )
    hidden, shown = (0, 20), (1, int(np.flatnonzero(held[1] >= 0)[0]))
    bad_k, bad_v = k.at[hidden].set(-jnp.inf), v.at[hidden].set(jnp.nan)
    if cause == "key":
        bad_k = bad_k.at[shown].set(-jnp.inf)
    else:
        bad_v = bad_v.at[(*shown, slice(None), 3)].set(jnp.inf)
    with on(INTERPRETED):
        decode = jax.jit(partial(run, implementation="pallas_gpu"))
        (y, lse), bad = decode(q, k, v), decode(q, bad_k, bad_v)
    assert np.isneginf(lse[2:]).all() and not np.asarray(y[2:]).any()
    rms(y, true, BAR)
    rms(lse[:2], true_lse[:2], 1e-5)
    for x, z in zip(bad, (y, lse), strict=True):
        assert not np.isfinite(np.asarray(x[1], np.float32)).any()
        np.testing.assert_array_equal(x[::2], z[::2])


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("multiples of 64 up to 256, not 80", {"key": 80}),
        ("multiples of 64 up to 256, not 320", {"value": 320}),
        ("64 or 128 keys, not 32", {"block": 32}),
        ("scale is positive, not -1", {"scale": -1.0}),
        ("it takes bfloat16, not float32", {"dtype": jnp.float32}),
    ],
)
def test_refusals(words, change):
    how = {name: change.pop(name) for name in ("block", "scale") if name in change}
    dtype = change.pop("dtype", jnp.bfloat16)
    qkv, _ = draw(np.random.default_rng(5), time=4, source=4, **change)
    with on(HOPPER), pytest.raises(NotImplementedError, match=words):
        attention(*(x.astype(dtype) for x in qkv), implementation="pallas_gpu", **how)
    with pytest.raises(NotImplementedError, match="Hopper"):
        attention(*draw(np.random.default_rng(5), source=T)[0], implementation="pallas_gpu")
