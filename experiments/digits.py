"""scikit-learn's digits: 1,797 images of handwritten digits, 8 x 8 pixels from 0 to 16 each."""

import functools
from typing import Literal, NamedTuple

import numpy as np


class Digits(NamedTuple):
    """Images (N, 8, 8) float32 from 0 to 1, and which digit each shows, int32 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def digits() -> tuple[Digits, Digits]:
    """1,437 images to train on, and 360 to test on: always the same. ValueError where the package
    is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the package scikit-learn is missing: pip install 'scanax[datasets]'"
        ) from None
    found = load_digits()
    images, labels = (found.images / 16).astype(np.float32), found.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = len(labels) * 4 // 5
    train, test = (Digits(images[which], labels[which]) for which in (order[:cut], order[cut:]))
    return train, test


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
