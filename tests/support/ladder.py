"""The ladder's rungs: inputs, their float64 answer by the token recurrence, and the bars."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from support.mixers import BATCH, CASES, MIXERS, UNIFORM

BARS = {jnp.float32: (1e-5, 1e-4), jnp.float64: (1e-10, 1e-10)}
BY_NAME = {m.name: m for m in MIXERS}


def resets(rng, time):
    """Rows of documents: boundaries at random, two in a row, on the first and the last token."""
    reset = rng.random((BATCH, time)) < 0.05
    reset[0, [0, -1]] = True
    reset[1, time // 2 : time // 2 + 2] = True
    reset[1, 0] = False
    return reset


def with_gradients(run):
    """(y, state) and the gradients to every input for given cotangents, in one compiled call."""

    def call(inputs, cotangents, reset):
        out, pull = jax.vjp(lambda x: run(x, reset), inputs)
        return out, pull(cotangents)[0]

    return jax.jit(call)


@cache
def problem(name, case, dtype, time, packed=True):
    """Inputs in `dtype`, and the float64 answer for those very numbers."""
    mixer = BY_NAME[name]
    rng = np.random.default_rng(CASES.index(case))
    inputs = jax.tree.map(lambda x: np.asarray(x, dtype), mixer.draw(rng, time, case))
    reset = resets(rng, time) if packed else np.zeros((BATCH, time), bool)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
        shapes = jax.eval_shape(lambda x: mixer.meaning(x, reset), exact)
        ct = jax.tree.map(lambda s: np.asarray(rng.normal(size=s.shape), dtype), shapes)
        exact_ct = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), ct)
        answer = oracle(name)(exact, exact_ct, reset)
    return inputs, ct, reset, jax.tree.map(np.asarray, answer)


@cache
def oracle(name):
    return with_gradients(BY_NAME[name].meaning)


def check(mixer, case, dtype, got, answer):
    (values, gradients), (true_values, true_gradients) = got, answer
    value_bar, gradient_bar = BARS[dtype]
    largest = max(np.abs(x).max() for x in jax.tree.leaves(true_gradients))
    pairs = [
        (path, x, y, value_bar, 0.0)
        for (path, x), y in zip(
            jax.tree.leaves_with_path(values), jax.tree.leaves(true_values), strict=True
        )
    ]
    for (path, x), y in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(true_gradients), strict=True
    ):
        vanishes = case in UNIFORM and any(
            getattr(part, "key", None) in mixer.vanishing for part in path
        )
        pairs.append((path, x, y, gradient_bar, 0.1 * largest if vanishes else 0.0))
    for path, x, y, bar, floor in pairs:
        x = np.asarray(x, np.float64)
        assert np.isfinite(x).all(), (case, path)
        size = max(np.abs(y).max(), floor)
        error = np.abs(x - y).max() / size if size else np.abs(x).max()
        assert error <= bar, f"{case} {jax.tree_util.keystr(path)}: error {error:.2e} > {bar}"
