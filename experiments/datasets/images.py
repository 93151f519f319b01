"""Images (N, height, width), float32: those of scikit-learn; made larger or smaller, and moved."""

import functools
import importlib
from typing import Any, Literal

import numpy as np


@functools.cache
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits: images (1797, 8, 8) from 0 to 1, and labels (1797,), int32.

    ValueError without scikit-learn.
    """
    try:
        data: Any = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError:
        raise ValueError(
            "the package scikit-learn is missing: pip install 'scanax[datasets]'"
        ) from None
    return (data.images / 16).astype(np.float32), data.target.astype(np.int32)


def resized(
    images: np.ndarray, size: tuple[int, int], method: Literal["linear", "nearest"]
) -> np.ndarray:
    """Images (N, *size), each axis on its own.

    A pixel is the square around its centre; outside of the outermost centres an image is as there.
    """
    for axis, length in enumerate(size, 1):
        old = images.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        if method == "nearest":
            images = images.take(np.floor(at + 0.5).astype(np.int64), axis)
            continue
        below = np.floor(at).astype(np.int64)
        part = (at - below).astype(np.float32).reshape((-1,) + (1,) * (2 - axis))
        above = images.take(np.minimum(below + 1, old - 1), axis)
        images = (1 - part) * images.take(below, axis) + part * above
    return images


def shifted(images: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Each image moved down and right by its whole numbers of pixels (N, 2); zeros come in."""
    moved = np.zeros_like(images)
    height, width = images.shape[1:]
    for new, old, (down, right) in zip(moved, images, by, strict=True):
        to = tuple(slice(max(s, 0), n + min(s, 0)) for s, n in ((down, height), (right, width)))
        at = tuple(slice(max(-s, 0), n + min(-s, 0)) for s, n in ((down, height), (right, width)))
        new[to] = old[at]
    return moved
