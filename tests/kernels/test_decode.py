"""Stream-K: every tile is dealt once, runs are even, partials share no slot and merge in order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import attention
from scanax.kernels.attention import decode, decode_pallas_tpu
from scanax.kernels.monoid import LOWEST
from support.compare import close
from support.targets import tracing

MOST = 9
partition = jax.jit(decode.partition, static_argnums=(2, 3))


@pytest.mark.parametrize("workers", [1, 2, 5, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_tile_is_dealt_once_and_evenly(workers, seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 4, 7).astype(np.int32)
    high = low + rng.integers(0, MOST - 3, 7).astype(np.int32)
    high[seed] = low[seed]  # one output reads nothing
    plan = jax.tree.map(np.asarray, partition(low, high, workers, MOST))
    live = [np.flatnonzero(row) for row in plan.live]
    runs = [len(steps) for steps in live]
    assert max(runs) - min(runs) <= 1
    assert all((steps == np.arange(len(steps))).all() for steps in live)
    dealt = [(plan.output[w, s], plan.tile[w, s]) for w in range(workers) for s in live[w]]
    assert dealt == [(o, t) for o in range(7) for t in range(low[o], high[o])]

    owner = {}
    for w in range(workers):
        for s in live[w]:
            mine = (w, plan.output[w, s])
            fresh = plan.slot[w, s] not in owner
            assert owner.setdefault(plan.slot[w, s], mine) == mine
            assert plan.starts[w, s] == fresh
    assert plan.used.shape == (7 + workers - 1,)
    assert set(np.flatnonzero(plan.used)) == set(owner)
    for o in range(7):
        slots = sorted(slot for slot, (_, whose) in owner.items() if whose == o)
        assert plan.last[o] == (slots[-1] if slots else -1)
        assert [slot for slot in np.flatnonzero(plan.begins) if slot in slots] == slots[:1]


def test_idle_workers_write_where_nobody_else_does():
    plan = jax.tree.map(np.asarray, partition(np.zeros(2, np.int32), np.ones(2, np.int32), 6, 1))
    assert len(set(plan.slot[:, 0])) == 6
    assert plan.used.sum() == 2


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_merged_partials_are_the_softmax(workers):
    """Scores and values of single keys as tiles; whatever lies in unused slots is not read."""
    rng = np.random.default_rng(0)
    low, high = np.array([0, 2, 5], np.int32), np.array([7, 2, 9], np.int32)
    plan = partition(low, high, workers, MOST)
    s, v = rng.normal(size=(3, MOST)) * 20, rng.normal(size=(3, MOST, 4))
    slots = plan.used.shape[0]
    m, u, w = np.full(slots, np.nan), np.full(slots, np.nan), np.full((slots, 4), np.nan)
    for o, t, slot, live, starts in zip(*(np.asarray(x).ravel() for x in plan[:5]), strict=True):
        if starts:
            m[slot], u[slot], w[slot] = LOWEST, 0, 0
        if live:
            top = max(m[slot], s[o, t])
            old, new = np.exp(m[slot] - top), np.exp(s[o, t] - top)
            m[slot], u[slot] = top, old * u[slot] + new
            w[slot] = old * w[slot] + new * v[o, t]
    partials = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (m, u, w))
    top, mass, weighted = decode.merge(plan, partials)
    assert (top[1], mass[1]) == (np.float32(LOWEST), 0) and not weighted[1].any()
    for o in (0, 2):
        weights = np.exp(s[o, low[o] : high[o]])
        mean = (weights[:, None] * v[o, low[o] : high[o]]).sum(0) / weights.sum()
        close(weighted[o] / mass[o], mean, 1e-5)
        close(top[o] + np.log(mass[o]), np.log(weights.sum()), 1e-5)


@pytest.mark.parametrize("block", [None, 16, 83, 200])
@pytest.mark.parametrize("spoiled", ["nothing", "hidden", "seen"])
def test_plain_xla(block, spoiled):
    """A last block that begins within the one before, rows of unequal lengths, slots not held."""
    rng, (batch, source, groups) = np.random.default_rng(0), (4, 83, 2)
    q, k, v = (
        rng.normal(size=size).astype(np.float32)
        for size in ((batch, 1, 4, 16), (batch, source, groups, 16), (batch, source, groups, 8))
    )
    q_index = np.asarray([[5], [82], [40], [82]], np.int32)
    q_start = np.maximum(q_index - 50, 0)
    held = np.where(rng.random((batch, source)) < 0.3, -1, np.arange(source)).astype(np.int32)
    held[2] = -1
    sees = (held >= q_start) & (held <= q_index)

    def run(implementation, block, q, k, v):
        where = {"q_index": q_index, "q_start": q_start, "kv_index": held}
        how = {"return_lse": True, "implementation": implementation, "block": block}
        return attention(q, k, v, **jax.tree.map(jnp.asarray, where), **how)

    y, lse = map(np.array, jax.jit(partial(run, "reference", None))(q, k, v))
    assert np.isneginf(lse[2]).all() and not y[2].any()
    for row in range(batch) if spoiled != "nothing" else ():
        (slots,) = np.nonzero(sees[row] == (spoiled == "seen"))
        k[row, slots[:1], 0, 3], v[row, slots[-1:], 0, 3] = np.inf, np.nan
    ours = jax.jit(partial(run, "xla", block))(q, k, v)
    nan = np.zeros((batch, 1, 4), bool)
    nan[[0, 1, 3], :, :2] = spoiled == "seen"  # the heads that read what is not finite
    for got, wanted in zip(ours, (y, lse), strict=True):
        got = np.asarray(got)
        assert np.isnan(got[nan]).all()
        empty = np.isneginf(wanted[~nan])
        np.testing.assert_array_equal(np.isneginf(got[~nan]), empty)
        close(np.where(empty, 0, got[~nan]), np.where(empty, 0, wanted[~nan]), 1e-6)


@pytest.mark.parametrize(("workers", "heads", "groups"), [(1, 4, 2), (2, 6, 1), (7, 8, 8)])
def test_the_kernel_for_tpus(workers, heads, groups, monkeypatch):
    monkeypatch.setitem(decode_pallas_tpu.CORES, "TPU v5 lite", workers)
    rng, (batch, source, key, value) = np.random.default_rng(heads), (3, 83, 16, 8)
    q, k, v = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in (
            (batch, 1, heads, key),
            (batch, source, groups, key),
            (batch, source, groups, value),
        )
    )
    q_index = jnp.asarray([[5], [82], [40]], jnp.int32)  # rows as unequal as can be
    held = np.where(rng.random((batch, source)) < 0.3, -1, np.arange(source))
    held[2, :] = -1  # and one that sees nothing
    run = partial(
        attention,
        q_index=q_index,
        q_start=jnp.maximum(q_index - 50, 0),
        kv_index=jnp.asarray(held, jnp.int32),
        return_lse=True,
        block=16,
    )

    def with_gradients(implementation, q, k, v):
        out, pull = jax.vjp(lambda *x: run(*x, implementation=implementation), q, k, v)
        return out, pull((jnp.ones_like(out[0]), jnp.zeros_like(out[1])))

    (y, lse), gradients = jax.jit(partial(with_gradients, "reference"))(q, k, v)
    with tracing("pallas_tpu"):
        (got, got_lse), ours = jax.jit(partial(with_gradients, "pallas_tpu"))(q, k, v)
    assert np.isneginf(got_lse[2]).all() and not got[2].any()
    close((got, got_lse[:2], ours), (y, lse[:2], gradients), 1e-5)
