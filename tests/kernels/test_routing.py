"""The laws of all routers: choices, weights and gradients, beside formulas in numpy's float64."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import routing
from scanax.sharding import hlo, mesh
from support.compare import close
from support.routing import (
    BIAS,
    CAPACITY,
    KEY,
    B,
    E,
    T,
    at,
    differences,
    draw,
    expert_choice,
    plain_sigmoid,
    sigmoid,
    softmax,
    weighed,
)

# The routers


@dataclasses.dataclass(frozen=True)
class Case:
    route: Callable  # logits -> Routing
    k: int
    formula: Callable  # logits in float64 -> experts, weights, probabilities
    total: float | None = None  # what the weights of a token sum to; None: they are probabilities
    biased: bool = False


def noisy(x):
    return routing.noisy(x, x[..., ::-1] - 1, 2)[0]  # both inputs from one: both gradients at once


def biased(x, **options):
    return routing.sigmoid(x, jnp.asarray(BIAS, x.dtype), 3, **options)


GROUPED = {"scale": 2.5, "groups": 4, "kept_groups": 2}
CASES = {
    "softmax renormalised": Case(
        functools.partial(routing.softmax, k=3, renormalize=True),
        3,
        lambda x: softmax(x, 3, True),
        1,
    ),
    "softmax": Case(
        functools.partial(routing.softmax, k=2, renormalize=False),
        2,
        lambda x: softmax(x, 2, False),
    ),
    "gshard": Case(routing.gshard, 2, lambda x: softmax(x, 2, True), 1),
    "switch": Case(routing.switch, 1, lambda x: softmax(x, 1, False)),
    "noisy": Case(noisy, 2, lambda x: softmax(x, 2, True), 1),
    "sigmoid": Case(plain_sigmoid, 2, lambda x: sigmoid(x, 0, 2, 1, 1, 1), 1),
    "sigmoid biased": Case(biased, 3, lambda x: sigmoid(x, BIAS, 3, 1, 1, 1), 1, biased=True),
    "sigmoid grouped": Case(
        functools.partial(biased, **GROUPED),
        3,
        lambda x: sigmoid(x, BIAS, 3, 2.5, 4, 2),
        2.5,
        biased=True,
    ),
    "expert choice": Case(
        functools.partial(routing.expert_choice, capacity=CAPACITY),
        E,
        lambda x: expert_choice(x, CAPACITY),
    ),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def compiled(case):
    """logits -> (Routing, gradient): one program, because compiling is what takes the time."""

    def number(x):
        routed = case.route(x)
        return weighed(routed), routed

    def both(x):
        gradient, routed = jax.grad(number, has_aux=True)(x)
        return routed, gradient

    return jax.jit(both)


@every
def test_a_router_is_its_formula_and_its_gradients_are_finite_differences(case):
    x = draw()
    with jax.enable_x64(True):
        x64 = jnp.asarray(x, jnp.float64)
        routed, exact = compiled(case)(x64)
        assert [a.dtype for a in routed] == [jnp.int32, jnp.float64, jnp.float64]
        close(routed, routing.Routing(*case.formula(x)), 1e-13)
        close(exact, differences(lambda x: weighed(case.route(x)), x64), 1e-8)
    single, gradient = compiled(case)(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(single.experts, routed.experts)
    close(single, routed, 1e-6)
    close(gradient, exact, 2e-6)
    for dtype in (jnp.float32, jnp.bfloat16):
        outputs = jax.eval_shape(case.route, jax.ShapeDtypeStruct((B, T, E), dtype))
        assert [a.dtype for a in outputs] == [jnp.int32, jnp.float32, jnp.float32]


@every
def test_weights_and_choices(case):
    routed, _ = compiled(case)(jnp.asarray(draw(1), jnp.float32))
    experts, weights, probabilities = (np.asarray(a) for a in routed)
    assert experts.shape == weights.shape == (B, T, case.k) and probabilities.shape == (B, T, E)
    real = experts < E
    assert experts.min() >= 0 and experts.max() <= E and (weights[~real] == 0).all()
    chosen = np.sort(np.where(real, experts, E + np.arange(case.k)), -1)  # none may come twice
    assert (np.diff(chosen, axis=-1) > 0).all()
    close(probabilities.sum(-1), np.ones((B, T)), 1e-6)
    if case.total is None:
        np.testing.assert_array_equal(
            weights[real], at(probabilities, np.minimum(experts, E - 1))[real]
        )
    else:
        close(weights.sum(-1), np.full((B, T), case.total), 1e-6)


@every
def test_tokens_in_another_order_are_routed_as_before(case):
    x, order = draw(2), np.random.default_rng(0).permutation(T)
    routed, other = (compiled(case)(jnp.asarray(a, jnp.float32))[0] for a in (x, x[:, order]))
    np.testing.assert_array_equal(other.experts, np.asarray(routed.experts)[:, order])
    close(other[1:], tuple(np.asarray(a)[:, order] for a in routed[1:]), 1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "expert choice"])
def test_any_leading_axes(name):
    case = CASES[name]
    x = jnp.asarray(draw(3), jnp.float32)
    routed, _ = compiled(case)(x)
    close(jax.jit(case.route)(x[1, 4]), jax.tree.map(lambda a: a[1, 4], routed), 1e-6)


@every
def test_of_equal_scores_the_lowest_index_wins(case):
    """All equal, as at the start of training; and three kinds of tokens with coarse logits."""
    few = draw(4, (3, E)).round()[np.random.default_rng(5).integers(0, 3, (B, T))]
    for x in (np.zeros((B, T, E)), few):
        routed, _ = compiled(case)(jnp.asarray(x, jnp.float32))
        if case.k == E:  # equal tokens; probabilities are as equal as float32 has them
            expected = expert_choice(x, CAPACITY, np.asarray(routed.probabilities))[0]
        else:  # equal experts
            expected = case.formula(x)[0]
        np.testing.assert_array_equal(routed.experts, expected)
    routed, _ = compiled(case)(jnp.zeros((B, T, E), jnp.float32))
    if case.k == E:
        assert ((routed.experts[0, :, 0] < E) == (np.arange(T) < CAPACITY)).all()
    elif not case.biased:
        assert (routed.experts == jnp.arange(case.k, dtype=jnp.int32)).all()


@every
def test_extreme_logits(case):
    rng = np.random.default_rng(7)
    mixed = rng.choice([-1e4, -100.0, -40.0, 0.0, 1e4], (B, T, E))
    for x in (mixed, np.full((B, T, E), -1e4), np.full((B, T, E), 1e4), draw(8) * 30 - 60):
        x32 = jnp.asarray(x, jnp.float32)
        routed, gradient = compiled(case)(x32)
        with jax.enable_x64(True):
            _, exact = compiled(case)(x32.astype(jnp.float64))
        close(routed[1:], case.formula(np.asarray(x32, np.float64))[1:], 1e-6)
        close(gradient, exact, 1e-5)


@every
def test_what_is_not_finite_stays_with_its_token(case):
    """It is not hidden, and no other token sees it; under expert choice no other row does."""
    x = jnp.asarray(draw(25), jnp.float32)
    sound, _ = compiled(case)(x)
    others = np.ones((B, T), bool)
    others[1, slice(None) if case.k == E else 3] = False
    for bad in (np.nan, -np.nan):  # the sign of nan is a bit that processors set at will
        routed, _ = compiled(case)(x.at[1, 3, 2].set(bad))
        assert all(jnp.isnan(a[1, 3]).any() for a in routed[1:])
        for a, b in zip(routed, sound, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])


@every
def test_tokens_may_lie_over_devices(case):
    """No token is gathered or sent, forward or backward."""
    x = jnp.asarray(draw(9), jnp.float32)
    over = mesh.make("data=2,seq=2")
    there = jax.device_put(x, mesh.sharding(over, "data", "seq"))
    with jax.set_mesh(over):
        program = compiled(case).lower(there).compile()
        assert set(hlo.count(program.as_text()).calls) <= {"all-reduce"}
        spread = jax.tree.map(np.asarray, program(there))
    close(spread, compiled(case)(x), 1e-6)


def test_random_routers_over_devices():
    x = jnp.asarray(draw(9), jnp.float32)
    key = jax.random.key(KEY)

    def both(x):
        routed, importance, load = routing.noisy(x, -x, 2, key)
        return routing.gshard(routing.jitter(x, key), key), routed, importance, load

    over = mesh.make("data=2,seq=2")
    there = jax.device_put(x, mesh.sharding(over, "data", "seq"))
    with jax.set_mesh(over):
        program = jax.jit(both).lower(there).compile()
        assert set(hlo.count(program.as_text()).calls) <= {"all-reduce"}
        spread = jax.tree.map(np.asarray, program(there))
    close(spread, jax.jit(both)(x), 1e-6)


# Errors


def test_what_cannot_be_is_refused(unchecked):
    x = jnp.zeros((B, T, E), jnp.float32)
    bias = x[0, 0]
    with pytest.raises(ValueError, match="k=9 of 8"):
        routing.softmax(x, 9, renormalize=True)
    with pytest.raises(ValueError, match="k=0 of 8"):
        routing.softmax(x, 0, renormalize=True)
    with pytest.raises(ValueError, match="k=9 of 8"):
        routing.noisy(x, x, 9)
    for options in ({"groups": 3}, {"groups": 4, "kept_groups": 5}, {"groups": 4}):
        with pytest.raises(ValueError, match=f"k=3 of 8 experts in groups={options['groups']}"):
            routing.sigmoid(x, bias, 3, **options)
    for capacity in (0, T + 1):
        with pytest.raises(ValueError, match=f"capacity={capacity} of 10 tokens"):
            routing.expert_choice(x, capacity)
    with pytest.raises(ValueError, match="by='weight'"):
        routing.ranks(jnp.zeros((3, 2), jnp.int32), x[0, :3, :2], E, by="weight")
