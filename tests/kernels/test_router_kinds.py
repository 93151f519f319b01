"""What one router has and others have not: chance, noise, biases, cosines."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import routing
from support.compare import close
from support.routing import (
    KEY,
    B,
    E,
    T,
    at,
    differences,
    draw,
    expert_choice,
    logistic,
    plain_sigmoid,
    soft,
    softmax,
    top,
    weighed,
)

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
