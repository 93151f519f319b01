"""The laws of kernels/monoid.py: associativity, identity, and all schedules the same numbers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import monoid
from scanax.kernels.monoid import DECAY, SOFTMAX, Monoid, resettable
from scanax.kernels.prefixes import prefixes
from support.compare import close

LOGS = np.array([0.0, -1e-4, -1.0, -30.0, -200.0, -1e30, -np.inf])  # decay 1 down to exactly 0
SCORES = np.array([0.0, 3.0, -5.0, 80.0, -200.0, 1e4, monoid.LOWEST])


@dataclasses.dataclass(frozen=True)
class Case:
    monoid: Monoid
    draw: Callable  # (rng, time) -> elements


def scalar(rng, time):
    return rng.choice(LOGS, (time, 3)), rng.normal(size=(time, 3, 4, 2))


def vector(rng, time):
    return rng.choice(LOGS, (time, 3, 4)), rng.normal(size=(time, 3, 4, 2))


def step_sizes(rng, time):
    return -rng.choice(LOGS[:-1], (time, 4)), rng.normal(size=(time, 4, 5))


def softmax(rng, time):
    m, w = rng.choice(SCORES, (time, 3)), rng.normal(size=(time, 3, 4))
    empty = m == monoid.LOWEST  # a set without elements has no mass
    return m, np.where(empty, 0.0, rng.uniform(1, 2, (time, 3))), np.where(empty[..., None], 0.0, w)


def flagged(draw):
    return lambda rng, time: (rng.random((time, 3)) < 0.3, draw(rng, time))


A = -np.array([1.0, 2.0, 4.0, 0.5, 1e-3])
MAMBA = monoid.decay(lambda delta, h: jnp.exp(delta[..., None] * A) * h)
CASES = {
    "scalar decay": Case(DECAY, scalar),
    "vector decay": Case(DECAY, vector),
    "sum of step sizes": Case(MAMBA, step_sizes),
    "softmax": Case(SOFTMAX, softmax),
    "resettable decay": Case(resettable(DECAY), flagged(vector)),
    "resettable softmax": Case(resettable(SOFTMAX), flagged(softmax)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def elements(case, time, seed=0):
    return jax.tree.map(jnp.asarray, case.draw(np.random.default_rng(seed), time))


def same(actual, desired):
    """Equal to 1e-12; -inf and -1e30 are logs as good as others, and must be met exactly."""

    def finite(x):
        return jnp.where(jnp.isfinite(x) & (jnp.abs(x) < 1e20), x, 0)

    close(jax.tree.map(finite, actual), jax.tree.map(finite, desired), 1e-12)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_array_equal(jnp.abs(x) < 1e20, jnp.abs(y) < 1e20)
        assert not jnp.isnan(x).any()


@every
def test_combine_is_associative(case):
    a, b, c = (elements(case, 200, seed) for seed in range(3))  # 200 triples at once
    combine = case.monoid.combine
    same(combine(combine(a, b), c), combine(a, combine(b, c)))


@every
def test_identity_is_neutral_on_both_sides(case):
    x = elements(case, 200)
    none = case.monoid.identity(x)
    assert jax.tree.all(
        jax.tree.map(lambda i, e: i.dtype == e.dtype and i.shape == e.shape, none, x)
    )
    for combined in (case.monoid.combine(none, x), case.monoid.combine(x, none)):
        same(combined, x)
    same(case.monoid.combine(none, none), none)


@every
@pytest.mark.parametrize("time", [1, 2, 13])
def test_schedules_agree(case, time):
    """scan = associative from any prefix; their last is the prefix and the fold."""
    tokens = elements(case, time, seed=time)
    prefix = jax.tree.map(lambda x: x[0], elements(case, 1, seed=99))

    @jax.jit
    def schedules(tokens, prefix):
        folded = case.monoid.combine(prefix, monoid.fold(case.monoid, tokens))
        return *(s(case.monoid, tokens, prefix) for s in (monoid.scan, monoid.associative)), folded

    by_token, associative, folded = schedules(tokens, prefix)
    same(associative, by_token)
    same(folded, jax.tree.map(lambda x: x[-1], by_token))


def test_order_is_time():
    """combine(earlier, later): the later decay acts on the earlier state, not the reverse."""
    (earlier, later) = ((jnp.log(0.5), jnp.array(2.0)), (jnp.log(0.25), jnp.array(3.0)))
    log, state = DECAY.combine(earlier, later)
    close((log, state), (np.log(0.125), 3.5), 1e-15)


@pytest.mark.parametrize("inner", ["vector decay", "softmax"])
def test_a_reset_forgets_exactly(inner):
    """From a flagged element on, prefixes are those of a run that begins there, to the bit."""
    case = CASES[inner]
    tokens, prefix = elements(case, 9), jax.tree.map(lambda x: x[0], elements(case, 1, seed=1))
    flags = jnp.zeros((9, 3), bool).at[4].set(True)
    rule, no = resettable(case.monoid), jnp.zeros(3, bool)
    _, whole = monoid.scan(rule, (flags, tokens), (no, prefix))
    rest = jax.tree.map(lambda x: x[4:], tokens)
    neutral = case.monoid.identity(prefix)
    _, alone = monoid.scan(rule, (flags[4:], rest), (no, neutral))
    poisoned = jax.tree.map(lambda x: x.at[3].set(jnp.nan), tokens)
    _, after_nan = monoid.scan(rule, (flags, poisoned), (no, prefix))
    for result in (whole, after_nan):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[4:], y), result, alone)


def test_softmax_reads_softmax():
    """w / u of the fold is softmax(scores) v, at scores far beyond what exp can hold."""
    rng = np.random.default_rng(3)
    scores, v = 400 * rng.normal(size=(11, 2)), rng.normal(size=(11, 2, 4))
    tokens = jnp.asarray(scores), jnp.ones((11, 2), jnp.float64), jnp.asarray(v)
    m, u, w = monoid.fold(SOFTMAX, tokens)
    weights = np.exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    close(w / u[..., None], np.einsum("th,thv->hv", weights, v), 1e-14)
    close(m, scores.max(axis=0), 0)


def test_decay_of_log_minus_infinity_is_zero():
    log, state = DECAY.combine(
        (jnp.zeros(2, jnp.float32), jnp.full((2, 3), 5.0, jnp.float32)),
        (jnp.full(2, -jnp.inf, jnp.float32), jnp.ones((2, 3), jnp.float32)),
    )
    np.testing.assert_array_equal(log, -np.inf)
    np.testing.assert_array_equal(state, 1.0)


@pytest.mark.parametrize("name", ["vector decay", "softmax"])
def test_prefixes_are_the_scan_with_documents_and_a_state(name):
    """Rows, chunks that divide nothing, resets, an initial state; values and all gradients."""
    case, batch, time = CASES[name], 2, 37
    rows = [elements(case, time + 1, seed) for seed in range(batch)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    noise = np.random.default_rng(3)  # of equal maxima each tree finds another gradient
    both = jax.tree.map(lambda x: jnp.maximum(x, -200.0) + noise.uniform(-0.1, 0, x.shape), both)
    x, state = jax.tree.map(lambda x: x[:, 1:], both), jax.tree.map(lambda x: x[:, 0], both)
    reset = jnp.asarray(np.random.default_rng(2).random((batch, time)) < 0.1)

    def meaning(x, state):
        def row(x, state, reset):
            rule = resettable(case.monoid)
            y = monoid.scan(rule, (reset, x), (jnp.zeros((), bool), state))[1]
            return y, jax.tree.map(lambda y: y[-1], y)

        return jax.vmap(row)(x, state, reset)

    def ours(chunk):
        return lambda x, state: prefixes(case.monoid, x, state=state, reset=reset, chunk=chunk)

    answer, pull = jax.vjp(meaning, x, state)
    for chunk in (None, 1, 8):
        found, back = jax.vjp(ours(chunk), x, state)
        close(found, answer, 1e-12)
        close(back(answer), pull(answer), 1e-10)
    y, last = prefixes(case.monoid, x)  # neither documents nor a state
    none = case.monoid.identity(jax.tree.map(lambda x: x[0, 0], x))
    first = jax.tree.map(lambda x: x[0], x)
    close(jax.tree.map(lambda y: y[0], y), monoid.scan(case.monoid, first, none), 1e-12)
    close(last, jax.tree.map(lambda y: y[:, -1], y), 1e-12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"elements": (np.zeros((2, 5)), np.zeros((2, 4, 3)))}, "all must begin with one"),
        ({"elements": np.zeros((2, 0, 3))}, "hold no token; at least one"),
        ({"state": np.zeros((2, 4))}, r"state has shapes \(2, 4\), not \(2, 3\)"),
        ({"reset": np.zeros((2, 4), bool)}, r"reset has shape \(2, 4\), not \(2, 5\)"),
        ({"chunk": 0}, "chunk=0; it must be at least 1"),
    ],
)
def test_prefixes_that_cannot_be_are_named(change, says, unchecked):
    given = {"elements": np.zeros((2, 5, 3)), **change}
    with pytest.raises(ValueError, match=says):
        prefixes(monoid.COUNT, **given)
