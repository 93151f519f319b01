"""Attention's own laws: masks, caches by index, the log-sum-exp, empty rows, non-finite numbers."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import attention
from scanax.kernels.attention import tiles
from support.compare import close, rms
from support.targets import tracing

B, T, S, H, G, K, V = 2, 37, 53, 4, 2, 16, 6  # K**-0.5 is exact in binary
IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu")
BARS = {jnp.float32: (1e-5, 1e-4), jnp.float64: (1e-10, 1e-10)}


def draw(rng, time=T, source=S):
    return (
        rng.normal(size=(B, time, H, K)),
        rng.normal(size=(B, source, G, K)),
        rng.normal(size=(B, source, G, V)),
    )


def dense(q, k, v, see):
    """The whole matrix of scores; a row that sees nothing gives 0 and -inf."""
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
    some = see.any(-1)[:, None]
    scores = jnp.where(see[:, None], scores, -jnp.inf)
    scores = jnp.where(some[..., None], scores, 0)
    weights = jnp.where(some[..., None], jax.nn.softmax(scores), 0)
    lse = jnp.where(some, jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return jnp.einsum("bhts,bshv->bthv", weights, v), jnp.moveaxis(lse, 1, 2)


def with_gradients(run):
    """(y, lse) and gradients to q, k and v from the cotangents of both."""

    def call(qkv, cotangents, *mask):
        out, pull = jax.vjp(lambda *x: run(*x, *mask), *qkv)
        return out, pull(cotangents)

    return jax.jit(call)


@cache
def cached(implementation):
    """Attention whose mask is data, as a cache gives it."""

    def run(q, k, v, q_index, q_start, kv_index):
        return attention(
            *(q, k, v),
            q_index=q_index,
            q_start=q_start,
            kv_index=kv_index,
            return_lse=True,
            block=16,
            implementation=implementation,
        )

    return with_gradients(run)


oracle = with_gradients(dense)


def masks(rng):
    """name -> (q_index, q_start, kv_index): caches in order, wrapped, part empty, all empty."""
    index, slots = np.arange(T) + S - T, np.broadcast_to(np.arange(S), (B, S))
    rows = np.broadcast_to(index, (B, T))
    ring = np.stack([np.roll(np.arange(S) + 100, 20), np.roll(np.arange(S) + 300, -7)])
    holes = np.where(rng.random((B, S)) < 0.4, -1, rng.permuted(slots, axis=1))
    starts = np.sort(rng.integers(0, S, (B, T)), axis=1)
    blind = np.where(rng.random((B, T)) < 0.3, 10 * S, 0)
    empty = np.array([[True], [False]])
    return {
        "in order": (rows, 0 * rows, slots),
        "all": (0 * rows + S, 0 * rows, slots),
        "wrapped": (rows + np.array([[100], [300]]), 0 * rows + 90, ring),
        "documents and holes": (rows, np.minimum(starts, rows), holes),
        "some see nothing": (rows, blind, holes),
        "a row without keys": (rows, 0 * rows, np.where(empty, -1, slots)),
    }


MASKS = masks(np.random.default_rng(0))


def seen(q_index, q_start, kv_index):
    key = kv_index[:, None, :]
    return (q_start[..., None] <= key) & (key <= q_index[..., None]) & (key >= 0)


def compare(got, true, dtype):
    ((y, lse), gradients), ((true_y, true_lse), true_gradients) = got, true
    value_bar, gradient_bar = BARS[dtype]
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(true_lse))
    finite = np.isfinite(np.asarray(true_lse))
    close((y, np.where(finite, lse, 0)), (true_y, np.where(finite, true_lse, 0)), value_bar)
    close(gradients, true_gradients, gradient_bar)


@pytest.mark.parametrize("dtype", BARS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_every_mask_is_the_dense_one(implementation, dtype):
    every_mask(implementation, dtype)


def test_every_mask_by_a_kernel():
    every_mask("pallas_tpu", jnp.float32)


def every_mask(implementation, dtype):
    rng = np.random.default_rng(1)
    for name, mask in MASKS.items():
        see = seen(*mask)
        qkv = [np.asarray(x, dtype) for x in draw(rng)]
        ct = [np.asarray(rng.normal(size=s), dtype) for s in ((B, T, H, V), (B, T, H))]
        ct[1] *= see.any(-1)[..., None]  # the -inf of an empty row is a constant
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (qkv, tuple(ct)))
            true = jax.tree.map(np.asarray, oracle(*exact, see))
        with jax.enable_x64(dtype == jnp.float64), tracing(implementation):
            mask = [jnp.asarray(x, jnp.int32) for x in mask]
            got = cached(implementation)(qkv, tuple(ct), *mask)
            assert all(x.dtype == dtype for x in jax.tree.leaves(got)), name
            compare(got, true, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_of_ten_thousands(implementation):
    """Integers, so that the scores themselves are exact in float32: the bars stay."""
    rng = np.random.default_rng(2)
    sizes = (B, T, H, K), (B, S, G, K)
    q, k = (np.asarray(rng.integers(-160, 161, size), np.float32) for size in sizes)
    v = np.asarray(rng.normal(size=(B, S, G, V)), np.float32)
    ct = np.asarray(rng.normal(size=(B, T, H, V)), np.float32), np.zeros((B, T, H), np.float32)
    mask = MASKS["in order"]
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), ((q, k, v), ct))
        (y, lse), _ = jax.tree.map(np.asarray, oracle(*exact, seen(*mask)))
    assert np.abs(lse).max() > 1e4
    with tracing(implementation):
        got, gradients = cached(implementation)(
            (q, k, v), ct, *(jnp.asarray(x, jnp.int32) for x in mask)
        )
    close(got, (y, lse), 1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_non_finite_numbers_reach_what_may_see_them(implementation):
    rng = np.random.default_rng(3)
    mask = [jnp.asarray(x, jnp.int32) for x in MASKS["documents and holes"]]
    see = seen(*map(np.asarray, mask))
    q, k, v = (np.asarray(x, np.float32) for x in draw(rng))
    dy = np.asarray(rng.normal(size=(B, T, H, V)), np.float32)
    none = np.zeros((B, T, H), np.float32)
    with tracing(implementation):  # of copies: JAX may still read them when the lines below write
        clean = cached(implementation)((q.copy(), k.copy(), v.copy()), (dy.copy(), none), *mask)
    bad_key, bad_query = np.zeros((B, S), bool), np.zeros((B, T), bool)
    bad_key[0, [3, 20, 40]] = bad_query[1, [5, 30]] = True
    k[0, 3, :, 2], v[0, 20, :, 1], k[0, 40] = np.nan, np.inf, -np.inf
    q[1, 5, :, 0], dy[1, 30, :, 0] = np.inf, np.nan
    got = cached(implementation)((q, k, v), (dy, none), *mask)

    sees = (see & bad_key[:, None]).any(-1)
    bad_value = sees | (bad_query & np.isinf(q).any((2, 3)) & see.any(-1))
    bad_row = bad_value | (bad_query & see.any(-1))
    reached = (see & bad_row[..., None]).any(1)
    assert bad_row.any() and not bad_row.all() and reached.any() and not reached.all()
    expected = ((bad_value, bad_value), (bad_row, reached, reached))
    for x, true, nan in zip(*map(jax.tree.leaves, (got, clean, expected)), strict=True):
        x, true = np.asarray(x), np.asarray(true)
        assert not np.isfinite(x[nan]).all(axis=tuple(range(1, x[nan].ndim))).any()
        empty = np.isneginf(true[~nan])
        np.testing.assert_array_equal(np.isneginf(x[~nan]), empty)
        close(np.where(empty, 0, x[~nan]), np.where(empty, 0, true[~nan]), 1e-5)


WAYS = {
    "causal": {},
    "causal window": {"window": 5},
    "whole": {"causal": False},
    "window back from the end": {"causal": False, "window": 5},
    "documents": {"reset": True},
    "whole documents": {"reset": True, "causal": False},
    "windows in documents": {"reset": True, "window": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_the_arguments_let_a_query_see(way):
    """q = 0 and one-hot values read the mask itself: the uniform weights over what is seen."""
    rng = np.random.default_rng(4)
    how = dict(WAYS[way])
    reset = rng.random((B, T)) < 0.15
    document = np.cumsum(reset, axis=1) * ("reset" in how)
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    see = document[:, :, None] == document[:, None]
    see = see & (s <= t if how.get("causal", True) else True) & (s > t - how.get("window", T))
    how |= {"reset": jnp.asarray(reset)} if "reset" in how else {}
    v = np.broadcast_to(np.eye(T, dtype=np.float32)[None, :, None], (B, T, 1, T))
    q = jnp.zeros((B, T, 1, 4), jnp.float32)
    for name in IMPLEMENTATIONS:
        with tracing(name):
            y = attention(q, q, jnp.asarray(v), block=16, implementation=name, **how)[:, :, 0]
        np.testing.assert_allclose(y, see / see.sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_one_query_and_bfloat16(implementation):
    rng = np.random.default_rng(5)
    for time in (1, T):
        qkv = [jnp.asarray(x, jnp.bfloat16) for x in draw(rng, time)]
        ct = jnp.asarray(rng.normal(size=(B, time, H, V)), jnp.bfloat16)
        q_index = jnp.broadcast_to(jnp.arange(S - time, S, dtype=jnp.int32), (B, time))
        run = partial(attention, q_index=q_index, return_lse=True, implementation=implementation)
        cotangents = ct, jnp.zeros((B, time, H), jnp.float32)
        with tracing(implementation):
            got = with_gradients(run)(qkv, cotangents)
        assert got[0][0].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (qkv, cotangents))
            see = np.asarray(q_index)[..., None] >= np.arange(S)
            true = jax.tree.map(np.asarray, oracle(*exact, see))
        rms(got, true, 0.003 if implementation == "xla" else 0.005)


def test_reference_differentiates_any_way():
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(rng, 3, 5))
    index = jnp.broadcast_to(jnp.arange(2, 5, dtype=jnp.int32), (B, 3))
    see = np.asarray(index)[..., None] >= np.arange(5)

    def curvature(run):
        def slope(q):
            return jax.grad(lambda q: (run(q, k, v)[0] ** 2).sum())(q)

        return jax.jvp(slope, (q,), (jnp.ones_like(q),))[1]

    reference = partial(attention, q_index=index, return_lse=True, implementation="reference")
    second = jax.jit(lambda: (curvature(reference), curvature(partial(dense, see=see))))
    close(*second(), 1e-4)


def test_hidden_tiles_are_not_visited():
    def visits(first, last, index, block=8):
        keys = tiles.cut(jnp.asarray(index), block, -1)
        (first, last), _ = tiles.intervals(jnp.asarray(first), jnp.asarray(last), block)
        spans = [
            tiles.span(*tiles.extent(keys), a.min(-1), b.max(-1))
            for a, b in zip(first, last, strict=True)
        ]
        return [int(high - low) for low, high in spans]

    index = np.broadcast_to(np.arange(64, dtype=np.int32), (B, 64))
    assert visits(0 * index, index, index) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert visits(np.maximum(index - 8, 0), index, index) == [1] + [2] * 7
    assert visits(index // 16 * 16, index, index) == [1, 2] * 4
    assert visits(0 * index, index, 0 * index - 1) == [0] * 8


def test_memory_grows_with_the_tokens_not_with_their_square():
    def needs(time):
        x = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
        slope = jax.grad(lambda q, k, v: attention(q, k, v, block=64).sum(), (0, 1, 2))
        return jax.jit(slope).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = needs(1024), needs(4096)
    assert large <= 4 * small and large < 4096 * 4096


q, kv = jnp.zeros((2, 4, 4, 8), jnp.float32), jnp.zeros((2, 6, 2, 8), jnp.float32)
WRONG = {
    "differ in batch": (q, kv[:1], kv, {}),
    "at least one token": (q[:, :0], kv, kv, {}),
    "8 features and k 7": (q, kv[..., :7], kv, {}),
    "2 heads, which does not divide 3": (q[:, :, :3], kv, kv, {}),
    "needs q_index": (q, kv, kv, {}),
    "window=0": (q, q, q, {"window": 0}),
    "block=0": (q, q, q, {"block": 0}),
    "block='16'; it must be a whole": (q, q, q, {"block": "16"}),
    "v is int32": (q, q, q.astype(np.int32), {}),
    "it must have 4 axes": (q[0], q, q, {}),
    "has no features": (q[..., :0], q[..., :0], q, {}),
    "reset has shape": (q, q, q, {"reset": jnp.zeros((2, 5), bool)}),
    "reset goes with": (q, kv, kv, {"reset": jnp.zeros((2, 4), bool)}),
}


@pytest.mark.parametrize("words", WRONG)
def test_errors_name_the_value(words, unchecked):
    q, k, v, how = WRONG[words]
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **how)
