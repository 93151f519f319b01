"""Batches as pure functions of (seed, step): any step at once, so resuming replays nothing.

A batch is a dict of numpy arrays (batch, length): tokens and targets int32, reset bool (true on a
document's first token), weights float32 (0 where the target is not to be learned or counted).
Splitting a batch for accumulation means splitting its rows, never its time. `rows` asks for some of
a batch's rows only: a process makes those of its own devices.
"""

import hashlib

import numpy as np

from .corpus import Corpus, DataConfig, are_arrays, corpus
from .sources import Source

__all__ = ["Corpus", "DataConfig", "Source", "are_arrays", "corpus", "evaluation"]
__all__ += ["evaluation_steps", "permuted", "streams", "windows"]

Batch = dict[str, np.ndarray]
ALL = slice(None)


def windows(
    source: Source, seed: int, step: int, *, batch: int, length: int, rows: slice = ALL
) -> Batch:
    """Windows in a shuffled order, each once an epoch; every row starts fresh.

    The windows of an epoch tile the circle of tokens from an offset drawn for that epoch, so at
    most length - 1 tokens are left out of it, others each time.
    """
    _check(source, batch, length)
    count = len(source) // length
    made = []
    for serial in range(step * batch, (step + 1) * batch)[rows]:
        epoch, index = divmod(serial, count)
        offset = _random(seed, epoch, 0) % len(source)
        place = permuted(index, count, _random(seed, epoch, 1))
        made.append(source.window(offset + place * length, length))
    return _stack(made)


def streams(
    source: Source, seed: int, step: int, *, batch: int, length: int, rows: slice = ALL
) -> Batch:
    """Contiguous streams for a state carried across batches: row b goes on where row b ended.

    The rows start evenly spread over the circle of tokens, turned by an offset drawn from the seed;
    after len / batch tokens a row reaches where the next one began, and just goes on.
    """
    _check(source, batch, length)
    offset = _random(seed, 0, 2) % len(source)
    made = [
        source.window(offset + b * len(source) // batch + step * length, length)
        for b in range(batch)[rows]
    ]
    return _stack(made)


def evaluation(source: Source, index: int, *, batch: int, length: int, rows: slice = ALL) -> Batch:
    """Batch `index` of `evaluation_steps`: over all of them each token is a target once.

    Row b of the next batch goes on where row b of this one ended, so a state may be carried; and a
    few batches only are a sample spread over the text. Past the end there are zeros, weights too.
    """
    count, steps = _evaluation(source, batch, length)
    if not 0 <= index < steps:
        raise ValueError(f"evaluation batch {index} is not one of the {steps} there are")
    made = []
    for b in range(batch)[rows]:
        place = b * steps + index
        filled = max(0, min(length, len(source) - 1 - place * length)) if place < count else 0
        row = source.window(place * length, filled)
        made.append({k: np.pad(v, (0, length - filled)) for k, v in row.items()})
    return _stack(made)


def evaluation_steps(source: Source, *, batch: int, length: int) -> int:
    """How many batches cover the source once."""
    return _evaluation(source, batch, length)[1]


def permuted(index: int, count: int, key: int) -> int:
    """Where `index` goes in the permutation of range(count) that `key` names; nothing is stored.

    A Feistel network permutes the numbers of an even count of bits; a result that is too large is
    put through again until it is not (fewer than four times on average).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix(right, key, round_) & mask)
        index = (left << half) | right
        if index < count:
            return index


def _mix(value: int, key: int, round_: int) -> int:
    """64 well stirred bits (multiply and fold; Python's integers stand in for a 64-bit word)."""
    x = (value + 0x9E3779B97F4A7C15 * (round_ + 1) + key) & 0xFFFFFFFFFFFFFFFF
    for factor in (0xD6E8FEB86659FD93, 0xA0761D6478BD642F):
        x = ((x ^ (x >> 32)) * factor) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 32)


def _random(*key: int) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _evaluation(source: Source, batch: int, length: int) -> tuple[int, int]:
    _check(source, batch, length, whole=False)
    count = -(-(len(source) - 1) // length)
    return count, -(-count // batch)


def _check(source: Source, batch: int, length: int, whole: bool = True) -> None:
    if length < 1:
        raise ValueError(f"the sequence length is {length}; it must be at least 1")
    if batch < 1:
        raise ValueError(f"the batch size is {batch}; it must be at least 1")
    if whole and len(source) <= length:
        raise ValueError(
            f"{source.name} has {len(source)} tokens, too few for one sequence of {length} and "
            "the token after it"
        )


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
