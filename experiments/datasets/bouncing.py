"""Digits that bounce about in a frame: clips of any length, from scikit-learn's images.

The generator of Moving MNIST as ConvS5's authors use it (arXiv:2310.19694, after TECO,
arXiv:2210.02396), with handwritten digits of 8 x 8 pixels, enlarged, in the place of MNIST.
"""

import functools
from collections.abc import Iterable

import numpy as np

from .images import handwritten, resized

HELD_OUT = 5  # one digit in so many is never trained on


@functools.cache
def digits(size: int, heldout: bool) -> np.ndarray:
    """Images (N, size, size) from 0 to 1: 1,438 of scikit-learn's to train, or the other 359.

    Enlarged by linear interpolation between the centres of pixels. ValueError without scikit-learn.
    """
    images, _ = handwritten()
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(images) // HELD_OUT
    return resized(images[order[:cut] if heldout else order[cut:]], (size, size), "linear")


def paths(random: np.random.Generator, count: int, frames: int, speed: float) -> np.ndarray:
    """Places (frames, count, 2) from 0 to 1 of points that begin anywhere, in any direction.

    Each moves on by `speed` a frame; where it would leave the unit square it is put on the wall and
    that component of its velocity turns round, so that it stands up to a frame's way short of where
    a mirror would have it.
    """
    place, angle = random.random((count, 2)), 2 * np.pi * random.random(count)
    velocity = speed * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    found = np.empty((frames, count, 2))
    for frame in found:
        frame[:] = place
        place = place + velocity
        outside = (place < 0) | (place > 1)
        velocity = np.where(outside, -velocity, velocity)
        place = np.clip(place, 0, 1)
    return found


def clips(
    key: tuple[int, ...],
    rows: Iterable[int],
    *,
    frames: int,
    size: tuple[int, int],
    digit: int = 12,
    count: int = 2,
    speed: float = 0.15,
    heldout: bool = False,
) -> np.ndarray:
    """Clips (rows, frames, height, width, 1), float32 from -1 (black) to 1.

    `count` digits of `digit` x `digit` pixels, of which the brighter shows where they overlap;
    their corners are the places of `paths` in the room that a digit leaves, to the nearest pixel.
    Row r follows from (key, r) alone. ValueError for a digit that is larger than a frame.
    """
    if digit > min(size):
        raise ValueError(f"digit={digit} does not fit into frames of {size[0]} x {size[1]}")
    images, room = digits(digit, heldout), np.array(size) - digit

    def row(number):
        random = np.random.default_rng((*key, number))
        which = images[random.integers(len(images), size=count)]
        corners = np.rint(room * paths(random, count, frames, speed)).astype(int)
        clip = np.zeros((frames, *size), np.float32)
        for frame, places in zip(clip, corners, strict=True):
            for image, (top, left) in zip(which, places, strict=True):
                part = frame[top : top + digit, left : left + digit]
                np.maximum(part, image, out=part)
        return clip

    return 2 * np.stack([row(number) for number in rows])[..., None] - 1
