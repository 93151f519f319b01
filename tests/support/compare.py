"""How all tests compare trees of arrays: error relative to the tensor's largest value."""

from typing import Any

import jax
import numpy as np

Tree = Any


def close(actual: Tree, desired: Tree, bar: float) -> None:
    """Every leaf: finite, of the desired shape, and max|actual - desired| <= bar * max|desired|.

    A desired leaf that is all zeros is compared by absolute error.
    """
    _compare(actual, desired, bar, lambda x: np.abs(x).max(initial=0.0))


def rms(actual: Tree, desired: Tree, bar: float) -> None:
    """As `close`, in root mean square instead of maximum: for bfloat16."""
    _compare(actual, desired, bar, lambda x: np.sqrt(np.mean(x**2)) if x.size else 0.0)


def _compare(actual, desired, bar, norm):
    structures = jax.tree.structure(actual), jax.tree.structure(desired)
    assert structures[0] == structures[1], f"structure {structures[0]}, not {structures[1]}"
    failures = []
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(desired), strict=True
    ):
        failure = _failure(np.asarray(a, np.float64), np.asarray(b, np.float64), bar, norm)
        if failure:
            failures.append(f"{jax.tree_util.keystr(path) or 'value'}: {failure}")
    assert not failures, "\n".join(failures)


def _failure(a, b, bar, norm) -> str | None:
    """None, or why `a` is not `b`."""
    if a.shape != b.shape:
        return f"shape {a.shape}, not {b.shape}"
    for name, x in (("actual", a), ("desired", b)):
        if not np.isfinite(x).all():
            return f"{name} is not finite in {np.sum(~np.isfinite(x))} of {x.size} places"
    size = norm(b)
    error = norm(a - b) / (size or 1.0)
    if error <= bar:
        return None
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(np.abs(a - b)), a.shape))
    return f"error {error:.2e} > {bar:g}, worst at {worst}: {a[worst]:.9g}, not {b[worst]:.9g}"
