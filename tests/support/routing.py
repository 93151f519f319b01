"""Routers as formulas in numpy's float64, which sort where ours reduce."""

import jax
import jax.numpy as jnp
import numpy as np
from scanax.kernels import routing

B, T, E, CAPACITY = 2, 10, 8, 4
KEY = 7
BIAS = np.linspace(-0.4, 0.4, E)


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


def weighed(routed, *others):
    """A number in which every output has its own factor."""
    outputs = [routed.weights, routed.probabilities, *others]
    return sum(
        jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in outputs
    )


def draw(seed=0, shape=(B, T, E), scale=1.5):
    return np.random.default_rng(seed).normal(size=shape) * scale


def differences(function, x, step=1e-6):
    """Central differences of a float64 function, all coordinates at once."""
    steps = step * jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    values = jax.jit(jax.vmap(function))(x + jnp.stack([steps, -steps]).reshape(-1, *x.shape))
    return np.subtract(*np.asarray(values).reshape(2, *x.shape)) / (2 * step)


def plain_sigmoid(x):
    return routing.sigmoid(x, jnp.zeros(E, x.dtype), 2)
