"""Losses of a router, and the slots of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import routing
from support.compare import close
from support.routing import B, E, T, differences, draw, soft, top

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
