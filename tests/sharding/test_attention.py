"""Softmax attention over devices: every schedule is the dense one, sends what it says, is even."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels.attention import visible, visits
from scanax.sharding import attention as module
from scanax.sharding import hlo, mesh, ops
from scanax.sharding.schedule import Schedule, using
from support.compare import close, rms

B, K, V = 2, 5, 3
SCHEDULES = ("gather", "ring", "token-ring", "ulysses")
CUBE = "data=2,seq=2,tensor=2"
CASES = {  # mesh, length, heads, groups (one for all, too few for ulysses, enough), arguments
    "seq=8": ("seq=8", 64, 8, 2, {}),
    "seq=8, window": ("seq=8", 64, 8, 1, {"window": 20}),  # back to three devices of seven
    "cube": (CUBE, 64, 8, 4, {}),
    "cube, whole with a window": (CUBE, 64, 8, 1, {"causal": False, "window": 9}),
    "seq=3": ("seq=3", 60, 6, 2, {}),
    "seq=3, whole": ("seq=3", 60, 6, 6, {"causal": False}),
}


def dense(q, k, v, see):
    """The whole matrix of scores."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
    scores = jnp.where(see[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v), jnp.moveaxis(lse, 1, 2)


def seen(reset, causal=True, window=None):
    t, s = np.arange(reset.shape[1])[:, None], np.arange(reset.shape[1])[None]
    document = np.cumsum(reset, axis=1)
    see = document[:, :, None] == document[:, None]
    return see & (s <= t if causal else True) & (s > t - (window or reset.shape[1]))


def with_gradients(run):
    """(y, lse) and the gradients to q, k and v from the cotangents of both."""

    def call(qkv, cotangents, mask):
        out, pull = jax.vjp(lambda *x: run(*x, mask), *qkv)
        return out, pull(cotangents)

    return jax.jit(call)


oracle = with_gradients(dense)


def exact(qkv, cotangents, see):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (qkv, cotangents))
        return jax.tree.map(np.asarray, oracle(*wide, see))


@cache
def compiled(case, method):
    over, *_, how = CASES[case]
    call = with_gradients(
        lambda q, k, v, reset: ops.attention(q, k, v, reset=reset, return_lse=True, block=4, **how)
    )

    def on_mesh(*arguments):
        with jax.set_mesh(mesh.make(over)), using(Schedule(attention=method)):
            return call(*arguments)

    return on_mesh


def draw(case, dtype=jnp.float32, spread=3.0):
    _, time, heads, groups, _ = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v, dy, dlse = (
        rng.normal(size=(B, time, *more))
        for more in ((heads, K), (groups, K), (groups, V), (heads, V), (heads,))
    )
    qkv = [jnp.asarray(x, dtype) for x in (spread * q, k, v)]
    return qkv, (jnp.asarray(dy, dtype), jnp.asarray(dlse, jnp.float32))


@pytest.mark.parametrize("method", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_every_schedule_is_the_dense_one(case, method):
    """One document; and documents that begin and end on edges of devices and of their halves."""
    over, time, *_, how = CASES[case]
    none, packed = np.zeros((2, B, time), bool)
    half = time // (2 * mesh.parse(over)["seq"])
    packed[0, [0, half, 2 * half, 3 * half - 1, time - 1]] = True
    packed[1, [half + 1, 2 * half - 1, 3 * half]] = True
    qkv, ct = draw(case)
    for reset in (none, packed):
        got, true = compiled(case, method)(qkv, ct, reset), exact(qkv, ct, seen(reset, **how))
        close(got[0], true[0], 1e-5)
        close(got[1], true[1], 1e-4)


@pytest.mark.parametrize("method", SCHEDULES)
def test_bfloat16(method):
    """And without documents, which is another program."""
    qkv, ct = draw("cube", jnp.bfloat16, 1.0)
    got = compiled("cube", method)(qkv, ct, None)
    assert [x.dtype for x in got[0]] == [jnp.bfloat16, jnp.float32]
    assert {x.dtype for x in got[1]} == {jnp.dtype(jnp.bfloat16)}
    rms(got, exact(qkv, ct, seen(np.zeros((B, 64), bool))), 0.003)


@pytest.mark.parametrize("case", ["seq=8", "seq=8, window", "seq=3, whole"])
@pytest.mark.parametrize("method", SCHEDULES)
def test_non_finite_numbers_stay_in_their_document(method, case):
    """A key, a value, a query and a cotangent, in documents that lie on several devices."""
    run, (qkv, ct), reset = compiled(case, method), draw(case), np.zeros((B, CASES[case][1]), bool)
    reset[0, [15, 25, 35, 45]] = reset[1, [17, 22]] = True
    clean = run(qkv, ct, reset)
    (q, k, v), dy = (np.array(x) for x in qkv), np.array(ct[0])
    k[0, 18, :, 0], v[0, 19, :, 1], q[0, 38, :, 2], dy[1, 40, :, 0] = np.nan, np.inf, np.inf, np.nan
    (y, _), (_, dk, _) = got = run(
        [jnp.asarray(x) for x in (q, k, v)], (jnp.asarray(dy), ct[1]), reset
    )
    reached = np.zeros(reset.shape, bool)
    reached[0, 15:25] = reached[0, 35:45] = reached[1, 22:] = True
    for x, true in zip(*map(jax.tree.leaves, (got, clean)), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[~reached], np.asarray(true)[~reached])
    assert not np.isfinite(y[0, 19:25]).all(-1).any() and np.isfinite(y[1]).all()
    assert not np.isfinite(dk[1, 34:41]).all(-1).any()


DEVICES, TIME, H, G = 4, 64, 4, 2
UNIT = 4 * B * TIME // DEVICES  # bytes of one float32 number of each token of a device
Q, KV, Y, L = UNIT * H * K, UNIT * G * (K + V), UNIT * H * V, UNIT * H
OTHERS, RELAID = DEVICES - 1, Q + KV + Y  # q, k and v to zigzag and y back; the gradients likewise
SENT = {  # (schedule, how): what a device receives forward, and what backward
    ("gather", "causal"): (OTHERS * KV, OTHERS * KV),
    ("gather", "window"): (2 * KV, 2 * (KV + KV)),
    ("ring", "causal"): (OTHERS * KV + RELAID, OTHERS * (KV + KV) + RELAID),
    ("ring", "window"): (2 * KV, 2 * (KV + KV)),
    ("ring", "whole"): (OTHERS * KV, OTHERS * (KV + KV)),
    ("token-ring", "causal"): (
        OTHERS * (Q + Y + L) + RELAID,
        OTHERS * (Q + Y + L + L + Q) + RELAID,
    ),
    ("token-ring", "window"): (2 * (Q + Y + L), 2 * (Q + Y + L + L + Q)),
    ("ulysses", "causal"): 2 * (OTHERS / DEVICES * (Q + DEVICES // G * KV + Y),),
}


@pytest.mark.parametrize(("method", "how"), SENT)
def test_what_travels(method, how):
    """A window of 20 over spans of 16 reaches back to two devices of three."""
    more = {"causal": {}, "window": {"window": 20}, "whole": {"causal": False}}[how]
    shapes = [(B, TIME, *n) for n in ((H, K), (G, K), (G, V), (H, V))]
    *qkv, dy = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def received(function, *arguments):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return sum(hlo.count(text).received.values())

    with jax.set_mesh(mesh.make(f"seq={DEVICES}")), using(Schedule(attention=method)):
        attend = partial(ops.attention, **more)
        _, pull = jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv), *qkv)
        backward = received(lambda pull, dy: pull(dy), pull, dy)
        assert (received(attend, *qkv), backward) == SENT[method, how]


PARTS, LONG = 8, 16384


def work(method):
    """Tiles of scores by device and step, (forward, backward), and those of one device alone."""
    first, last = visible((1, LONG), True, None, None)
    span, whole = LONG // PARTS, np.arange(LONG, dtype=np.int32)

    @jax.jit
    def tiles(queries, keys):
        return jnp.stack(visits(first[:, queries], last[:, queries], keys[None]))

    alone = np.asarray(tiles(whole, whole))
    if method == "ulysses":  # all of time for a share of the heads
        return np.tile(alone / PARTS, (PARTS, 1, 1)), alone
    if method == "gather":
        each = [[tiles(module.places(r, PARTS, span, False), whole)] for r in range(PARTS)]
    else:
        ring = module.Ring(method == "token-ring", True, PARTS - 1, {})
        each = [
            [tiles(*module.meeting(ring, j, r, PARTS, span)) for j in range(PARTS)]
            for r in range(PARTS)
        ]
    return np.array(each), alone


@pytest.mark.parametrize("method", SCHEDULES)
def test_causal_work_is_even(method):
    """All devices together do the work of one, and the busiest its share, at every step."""
    each, alone = work(method)
    assert (each.sum((0, 1)) <= 1.15 * alone).all()
    busiest = PARTS * each.max(0).sum(0) / alone
    if method == "gather":  # the last span sees everything before it
        np.testing.assert_allclose(busiest, 1.87, atol=0.01)
    else:
        assert (busiest <= 1.15).all()


def test_errors_name_what_would_do():
    x = jnp.zeros((1, 24, 12, 4), jnp.float32)
    halves = "length=24 does not divide over seq=8 x halves=2 devices; 16 or 32 would"
    heads = "ulysses: heads=12 does not divide over seq=8 devices; 8 or 16 would"
    shared = "heads=12 does not divide over seq=4 x tensor=2 devices; 8 or 16 would"
    for over, method, words in (
        ("seq=8", "ring", f"attention by ring: {halves}"),
        ("seq=8", "token-ring", f"attention by token-ring: {halves}"),
        ("seq=8", "ulysses", heads),
        ("seq=4,tensor=2", "ulysses", shared),
    ):
        how = using(Schedule(attention=method))
        with jax.set_mesh(mesh.make(over)), how, pytest.raises(ValueError, match=words):
            ops.attention(x, x, x)
    for method in ("ring", "token-ring"):  # a window needs no zigzag
        with jax.set_mesh(mesh.make("seq=8")), using(Schedule(attention=method)):
            y = jax.eval_shape(partial(ops.attention, window=3), x, x, x)
        assert y.shape == x.shape
    with jax.set_mesh(mesh.make("seq=8")), pytest.raises(ValueError, match="dtype is no option"):
        ops.attention(x, x, x, dtype=jnp.float32)
    with jax.set_mesh(mesh.make("data=2")), pytest.raises(ValueError, match="on a mesh yet"):
        index = jnp.zeros((2, 24), jnp.int32)
        ops.attention(*3 * (x.repeat(2, 0),), kv_index=index, return_lse=True)
