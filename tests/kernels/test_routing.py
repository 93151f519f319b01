"""The laws of kernels/routing.py: choices, weights, gradients, losses and slots.

Every router meets a formula in numpy's float64, which sorts where ours reduces, and the stored
numbers of another code base's top-2.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scanax.kernels import routing
from scanax.sharding import hlo, mesh
from support.compare import close

B, T, E, CAPACITY = 2, 10, 8, 4
PARITY = Path(__file__).parents[1] / "parity"
BIAS = np.linspace(-0.4, 0.4, E)
KEY = 7


# The formulas


def soft(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logistic(x):
    return np.exp(-np.logaddexp(0, -x))


def top(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def at(x, experts):
    return np.take_along_axis(x, experts, -1)


def softmax(x, k, renormalize):
    p, e = soft(x), top(x, k)
    w = at(p, e)
    return e, w / w.sum(-1, keepdims=True) if renormalize else w, p


def sigmoid(x, bias, k, scale, groups, kept_groups):
    s, size = logistic(x), x.shape[-1] // groups
    chosen = s + bias
    for index in np.ndindex(x.shape[:-1]):
        best = np.sort(chosen[index].reshape(groups, size), -1)[:, -2:].sum(-1)
        for group in set(range(groups)) - set(top(best, kept_groups)):
            chosen[index][group * size : (group + 1) * size] = -np.inf
    e = top(chosen, k)
    w = at(s, e)
    p = soft(-np.logaddexp(0, -x))  # s / sum s where all s may underflow
    return e, scale * w / (w.sum(-1, keepdims=True) + 1e-20), p


def expert_choice(x, capacity, p=None):
    p = soft(x) if p is None else p
    taken = np.zeros(p.shape, bool)
    for b, e in np.ndindex(p.shape[0], p.shape[2]):
        taken[b, top(p[b, :, e], capacity), e] = True
    return np.where(taken, np.arange(p.shape[2]), p.shape[2]), np.where(taken, p, 0), p


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


def plain_sigmoid(x):
    return routing.sigmoid(x, jnp.zeros(E, x.dtype), 2)


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


def weighed(routed, *others):
    """A number in which every output has its own factor."""
    outputs = [routed.weights, routed.probabilities, *others]
    return sum(
        jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in outputs
    )


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


def draw(seed=0, shape=(B, T, E), scale=1.5):
    return np.random.default_rng(seed).normal(size=shape) * scale


def differences(function, x, step=1e-6):
    """Central differences of a float64 function, all coordinates at once."""
    steps = step * jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    values = jax.jit(jax.vmap(function))(x + jnp.stack([steps, -steps]).reshape(-1, *x.shape))
    return np.subtract(*np.asarray(values).reshape(2, *x.shape)) / (2 * step)


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


# One router's own


def test_gshard_keeps_the_second_by_chance():
    """Five standard deviations of a mean of 4000 draws of a probability."""
    x = jnp.asarray(draw(10, (5, E)), jnp.float32).at[0].set(0)  # of g = 1/2 both: always
    always = routing.gshard(x)
    keys = jax.random.split(jax.random.key(KEY), 4000)
    drawn = jax.jit(jax.vmap(lambda key: routing.gshard(x, key)))(keys)
    experts, weights = np.asarray(drawn.experts), np.asarray(drawn.weights)
    kept = experts[..., 1] < E
    np.testing.assert_array_equal(
        experts, np.where(kept[..., None] | [True, False], always.experts, E)
    )
    np.testing.assert_array_equal(
        weights, np.where(kept[..., None] | [True, False], always.weights, 0)
    )
    chance = np.minimum(1, 2 * np.asarray(always.weights[:, 1], np.float64))
    assert chance[0] == 1 and (chance[1:] < 0.99).all()
    assert (np.abs(kept.mean(0) - chance) <= 5 * np.sqrt(chance * (1 - chance) / 4000)).all()


def test_jitter():
    x = jnp.asarray(draw(11, (50, 40)), jnp.float32)
    ratio = np.asarray(routing.jitter(x, jax.random.key(KEY)) / x)
    assert 0.99 - 1e-6 <= ratio.min() < 0.9901 and 1.0099 < ratio.max() <= 1.01 + 1e-6
    # 2000 draws of a uniform of deviation 0.01 / sqrt(3)
    assert abs(ratio.mean() - 1) < 5 * 0.01 / np.sqrt(3 * x.size)
    assert routing.jitter(x.astype(jnp.bfloat16), jax.random.key(KEY)).dtype == jnp.bfloat16


def noisy_formula(clean, noise_logits, k, noise):
    """Shazeer's load as it is defined: the threshold is found among the other experts."""
    deviation = np.log1p(np.exp(noise_logits))
    scores = clean + noise * deviation
    experts, weights, _ = softmax(scores, k, True)
    importance, share = np.zeros(clean.shape[-1]), np.zeros(clean.shape)
    for index in np.ndindex(clean.shape[:-1]):
        for e, w in zip(experts[index], weights[index], strict=True):
            importance[e] += w
        for e in range(clean.shape[-1]):
            threshold = np.sort(np.delete(scores[index], e))[-k]
            share[index][e] = (clean[index][e] - threshold) / deviation[index][e]
    tokens = clean[..., 0].size
    phi = np.vectorize(math.erfc)(-share / np.sqrt(2)) / 2
    return experts, weights, importance / tokens, phi.reshape(tokens, -1).mean(0)


@pytest.mark.parametrize("k", [1, 2, E])
def test_noisy_is_its_formula(k):
    x, key = draw(12), jax.random.key(KEY)
    noise = np.asarray(jax.random.normal(key, x.shape, jnp.float32), np.float64)

    def number(x):
        outputs = routing.noisy(x, -x, k, key)
        return weighed(*outputs), outputs

    run = jax.jit(jax.value_and_grad(number, has_aux=True))
    with jax.enable_x64(True):
        x64 = jnp.asarray(x, jnp.float64)
        (_, (routed, importance, load)), exact = run(x64)
        close(exact, differences(lambda x: number(x)[0], x64), 1e-8)
        if k < E:
            expected = noisy_formula(x, -x, k, noise)
            close((*routed[:2], importance, load), expected, 1e-13)
        else:
            close(load, np.ones(E), 0)
        close(routed.probabilities, soft(x), 1e-13)
    x32 = jnp.asarray(x, jnp.float32)
    close(run(x32)[1], exact, 1e-5)
    _, _, counted = jax.jit(lambda x: routing.noisy(x, -x, k))(x32)
    close(counted, np.bincount(top(x, k).ravel(), minlength=E) / (B * T), 1e-6)


def test_noisy_load_is_how_often_an_expert_is_kept():
    """The mean over N keys of load less the share of tokens that have the expert.

    The load is the share's expectation given the noise of the others, so that the difference has
    mean 0 and, for a token, a variance of E[p (1 - p)] <= 1/4; tokens and keys are independent.
    Five standard deviations are then at most 2.5 / sqrt(N tokens).
    """
    keys = jax.random.split(jax.random.key(KEY), 2000)
    x = jnp.asarray(draw(13, (64, E)) + np.linspace(0, 2, E), jnp.float32)

    @jax.jit
    @jax.vmap
    def difference(key):
        routed, _, load = routing.noisy(x, -x, 2, key)
        return load - 2 * routing.load(routed.experts, E), load

    error, load = (np.asarray(a, np.float64) for a in difference(keys))
    assert (np.abs(error.mean(0)) <= 2.5 / np.sqrt(2000 * 64)).all()
    assert np.ptp(load.mean(0)) > 0.1  # experts differ by far more than the bound of 0.007


def test_noise_without_width():
    """softplus(-1e4) = 0 divides nothing."""
    x = jnp.asarray(draw(14), jnp.float32)

    def number(x, noise):
        return weighed(*routing.noisy(x, noise, 2, jax.random.key(KEY)))

    run = jax.jit(jax.value_and_grad(number, (0, 1)))
    for scale in (1, 0, 1e4):
        for width in (-1e4, 1e4):
            value, grads = run(scale * x, jnp.full_like(x, width))
            assert all(jnp.isfinite(a).all() for a in (value, *grads))
    _, _, load = routing.noisy(x, jnp.full_like(x, -1e4), 2, jax.random.key(KEY))
    close(load, 2 * routing.load(routing.softmax(x, 2, renormalize=True).experts, E), 1e-6)


def test_a_bias_moves_the_choice_and_not_the_weights():
    x = jnp.asarray(draw(15), jnp.float32)
    bias = jnp.zeros(E, jnp.float32).at[5].set(2.0)
    routed = routing.sigmoid(x, bias, 2)
    assert (routed.experts[..., 0] == 5).all()
    assert not (plain_sigmoid(x).experts == 5).any(-1).all()
    chosen = at(logistic(np.asarray(x, np.float64)), np.asarray(routed.experts))
    close(routed.weights, chosen / chosen.sum(-1, keepdims=True), 1e-6)
    grad = jax.jit(jax.grad(lambda bias: weighed(routing.sigmoid(x, bias, 2))))(bias)
    np.testing.assert_array_equal(grad, np.zeros(E))


def test_rebalancing_evens_the_load():
    x = jnp.asarray(draw(16, (512, E)) + np.linspace(0, 3, E), jnp.float32)

    def step(bias, _):
        load = routing.load(routing.sigmoid(x, bias, 2).experts, E)
        return routing.rebalanced(bias, load, 1e-3), routing.cv2(load)

    bias, uneven = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(E, jnp.float32), length=1000))()
    assert uneven[0] > 0.5 and uneven[-50:].max() < 1e-3 and bias.dtype == jnp.float32
    load = jnp.asarray([0.5, 0.25, 0.25, 0.0], jnp.float32)
    moved = routing.rebalanced(jnp.ones(4, jnp.float32), load, 0.125)
    np.testing.assert_array_equal(moved, [0.875, 1.0, 1.0, 1.125])


@pytest.mark.parametrize("capacity", [1, 3, T - 1, T])
def test_expert_choice_loads_are_exact(capacity):
    route = jax.jit(routing.expert_choice, static_argnames="capacity")
    for x in (draw(17), np.round(draw(18) / 4) * 4):  # the second has many equal tokens
        routed = route(jnp.asarray(x, jnp.float32), capacity=capacity)
        counts = np.asarray(routed.experts[..., None] == np.arange(E)).sum((1, 2))
        np.testing.assert_array_equal(counts, np.full((B, E), capacity))
        expected = expert_choice(None, capacity, np.asarray(routed.probabilities))
        np.testing.assert_array_equal(routed.experts, expected[0])


# Cosine


def cosine(h, e, log_temperature):
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, e)]
    return (h / lengths[0]) @ (e / lengths[1]).T / max(np.exp(log_temperature), 0.01)


@functools.cache
def compiled_cosine():
    def number(arguments):
        logits = routing.cosine_logits(*arguments)
        return jnp.sum(jnp.sin(logits)), logits

    return number, jax.jit(jax.value_and_grad(number, has_aux=True))


@pytest.mark.parametrize("temperature", [0.5, 0.02, 0.001])
def test_cosine_logits(temperature):
    values = draw(19, (B, T, 6)), draw(20, (E, 6)), np.log(temperature)
    flat = np.concatenate([a.ravel() for a in values])
    number, run = compiled_cosine()

    def of_flat(x):
        h, e, log_temperature = jnp.split(x, np.cumsum([B * T * 6, E * 6]))
        return number((h.reshape(B, T, 6), e.reshape(E, 6), log_temperature[0]))[0]

    with jax.enable_x64(True):
        (_, logits), exact = run(tuple(jnp.asarray(a, jnp.float64) for a in values))
        close(logits, cosine(*values), 1e-13)
        joined = np.concatenate([np.ravel(a) for a in exact])
        close(joined, differences(of_flat, jnp.asarray(flat, jnp.float64)), 1e-7)
        assert (exact[2] == 0) == (temperature < 0.01)
    (_, logits), gradients = run(tuple(jnp.asarray(a, jnp.float32) for a in values))
    close(logits, cosine(*values), 1e-6)
    close(gradients, exact, 5e-5 if temperature < 0.1 else 5e-6)  # sines of numbers up to 100


def test_cosine_logits_of_nothing():
    h, e = jnp.zeros((B, T, 6), jnp.float32), jnp.asarray(draw(21, (E, 6)), jnp.float32)
    for log_temperature in (np.log(0.5), 1e4, -1e4):
        arguments = h, e.at[0].set(0), jnp.float32(log_temperature)
        (_, logits), gradients = compiled_cosine()[1](arguments)
        assert (logits == 0).all() and all(jnp.isfinite(g).all() for g in gradients)


# Losses


def test_balance_is_one_when_balanced_and_E_when_collapsed():
    even = jnp.full((3, E), 1 / E, jnp.float32)
    one = jnp.zeros((3, E), jnp.float32).at[:, 2].set(1)
    for load in (even, even[0]):
        close(routing.balance(load, even), 1.0, 1e-6)
    close(routing.balance(one[0], one), float(E), 1e-6)
    f, p = np.random.default_rng(0).dirichlet(np.ones(E), 2)
    f, p = jnp.asarray(f, jnp.float32), jnp.asarray(p, jnp.float32)
    close(routing.balance(f, p), E * np.dot(f, p), 1e-6)
    through_load, through_p = jax.grad(routing.balance, (0, 1))(f, p)
    close((through_load, through_p), (np.zeros(E), E * np.asarray(f)), 1e-6)


def test_cv2():
    x = draw(22, (E,)) + 5
    with jax.enable_x64(True):
        x64 = jnp.asarray(x, jnp.float64)
        value, gradient = jax.jit(jax.value_and_grad(routing.cv2))(x64)
        close(value, np.var(x) / np.mean(x) ** 2, 1e-13)
        close(gradient, differences(routing.cv2, x64), 1e-8)
    for x in (jnp.full(1, 0.3, jnp.float32), jnp.zeros(E, jnp.float32)):
        value, grad = jax.jit(jax.value_and_grad(routing.cv2))(x)
        assert value == 0 and (grad == 0).all()


def test_z_and_entropy():
    x = draw(23)
    p = soft(x)
    z, entropy = (jax.jit(jax.value_and_grad(f)) for f in (routing.z, routing.entropy))
    with jax.enable_x64(True):
        value, gradient = z(jnp.asarray(x, jnp.float64))
        logsumexp = np.log(np.exp(x).sum(-1, keepdims=True))
        close(value, np.mean(logsumexp**2), 1e-13)
        close(gradient, 2 * logsumexp * p / (B * T), 1e-13)
        value, gradient = entropy(jnp.asarray(p, jnp.float64))
        close(value, np.mean(-(p * np.log(p)).sum(-1)), 1e-13)
        close(gradient, -(np.log(p) + 1) / (B * T), 1e-13)
    close(entropy(jnp.full((B, T, E), 1 / E, jnp.float32))[0], np.log(E), 1e-6)
    one = jnp.zeros((B, T, E), jnp.float32).at[..., 2].set(1)
    value, gradient = entropy(one)
    assert value == 0 and jnp.isfinite(gradient).all() and (gradient[..., 3] == 0).all()
    of_logits = jax.jit(jax.value_and_grad(lambda x: routing.entropy(jax.nn.softmax(x, -1))))
    for scale in (1e2, 1e4):
        far = jnp.asarray(scale * np.sign(x), jnp.float32).at[0, 0].set(scale * jnp.arange(E))
        for loss in (z, of_logits):
            value, gradient = loss(far)
            assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_load_counts_what_is_not_none():
    experts = jnp.asarray([[[0, 3], [0, 1]], [[2, 3], [0, 3]]], jnp.int32)  # 3: none
    np.testing.assert_array_equal(routing.load(experts, 3), np.float32([0.6, 0.2, 0.2]))
    np.testing.assert_array_equal(routing.load(experts, 3, first=True), [0.75, 0, 0.25])
    np.testing.assert_array_equal(routing.load(jnp.full((4, 2), 3, jnp.int32), 3), np.zeros(3))
    assert routing.load(experts, 3).dtype == jnp.float32


# Slots


@pytest.mark.parametrize("by", ["order", "score"])
@pytest.mark.parametrize(("n", "k", "number"), [(1, 1, 1), (37, 2, 5), (200, 3, 70)])
def test_slots_are_counted_first_choices_first(by, n, k, number):
    rng = np.random.default_rng(24)
    experts = np.argsort(rng.random((n, number)), -1)[:, :k]
    experts[rng.random((n, k)) < 0.2] = number  # none
    weights = rng.integers(0, 6, (n, k)) / 8  # with equal ones
    tokens = np.arange(n) if by == "order" else top(weights.max(-1), n)
    expected, counts = np.zeros((n, k), int), np.zeros(number + 1, int)
    for j in range(k):
        for t in tokens:
            expected[t, j] = counts[experts[t, j]]
            counts[experts[t, j]] += 1
    arguments = jnp.asarray(experts, jnp.int32), jnp.asarray(weights, jnp.float32)
    slots = jax.jit(routing.ranks, static_argnames=("E", "by"))(*arguments, E=number, by=by)
    assert slots.dtype == jnp.int32
    real = experts < number
    np.testing.assert_array_equal(np.asarray(slots)[real], expected[real])


def test_capacity():
    assert routing.capacity(100, 8, 2, 1.0) == 26
    assert routing.capacity(100, 8, 2, 1.25) == 32
    assert routing.capacity(38, 4, 2, 1.0) == 20
    assert routing.capacity(3, 8, 2, 0.25) == 1


# Another code base's top-2


@pytest.mark.parametrize("name", ["tutel_top2_cap1", "tutel_top2_dropless"])
@pytest.mark.parametrize("router", ["gshard", "softmax"])
def test_tutel(name, router):
    """Choices, weights, loss and, by computing every expert, which assignments are dropped."""
    folder = PARITY / name
    settings = json.loads((folder / "config.json").read_text())
    weights = {n: jnp.asarray(a) for n, a in load_file(folder / "model.safetensors").items()}
    inputs, expected, grads = (
        dict(np.load(folder / f"{n}.npz")) for n in ("inputs", "expected", "grads")
    )
    gate, number, k = "gates.0.wg.weight", settings["experts"], settings["k"]
    factor = settings["capacity_factor"]
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def layer(x, wg):
        logits = exact("btd,ed->bte", x, wg)
        if router == "gshard":
            routed = routing.gshard(logits)
        else:
            routed = routing.softmax(logits, k, renormalize=True)
        flat = [a.reshape(-1, k) for a in (routed.experts, routed.weights)]
        slots = routing.ranks(*flat, number, by="order")
        room = routing.capacity(x.shape[0] * x.shape[1], number, k, factor) if factor else jnp.inf
        kept = jnp.where(slots < room, flat[1], 0).reshape(routed.weights.shape)
        h = exact("btd,ehd->bteh", x, weights["experts.batched_fc1_w"])
        h = jax.nn.gelu(h + weights["experts.batched_fc1_bias"], approximate=False)
        out = exact("bteh,ehd->bted", h, weights["experts.batched_fc2_w"])
        out = out + weights["experts.batched_fc2_bias"]
        y = jnp.sum(
            kept[..., None] * jnp.take_along_axis(out, routed.experts[..., None], 2), axis=2
        )
        first = routing.load(routed.experts, number, first=True)
        l_aux = routing.balance(first, routed.probabilities)
        dropped = (slots >= room).any(-1).sum()
        return jnp.sum(y * inputs["ct"]) + l_aux, (y, l_aux, flat, dropped)

    run = jax.jit(jax.value_and_grad(layer, (0, 1), has_aux=True))
    (_, (y, l_aux, flat, dropped)), ours = run(jnp.asarray(inputs["x"]), weights[gate])
    np.testing.assert_array_equal(flat[0], expected["topk_idx"])
    close(flat[1], expected["topk_w"], 3e-6)
    close((l_aux, y), (expected["l_aux"], expected["y"]), 3e-6)
    close(ours, (grads["x"], grads[gate]), 1e-5)
    assert dropped == (6 if factor else 0)


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
