"""Synthetic recall: rows whose answers stand in the row itself, drawn as they are asked for.

A batch is a dict of arrays (rows, length): tokens and targets int32, weights float32 (1 where an
answer is due, else 0, and the target there is 0), reset bool (true on a row's first token). Row r
follows from (key, r) alone, so any rows can be had apart; key is three whole numbers, which a task
takes as (0 to train, 1 held out or 2 examined, seed, step).
"""

from collections.abc import Callable, Iterable

import numpy as np

Batch = dict[str, np.ndarray]
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, targets, where answers are due
Key = tuple[int, int, int]

NOISE, MARKER = 0, 1  # of selective copying; data tokens are those from 2 up
TRIGGER = 0  # of induction; ordinary tokens are those from 1 up
FILLER = 0  # of multi-query recall; keys are 1 .. K, values K + 1 .. 2 K, K = (vocab - 1) // 2


def selective_copying(
    key: Key, rows: Iterable[int], *, length: int, items: int = 16, vocab: int = 16
) -> Batch:
    """Noise with `items` data tokens at random places, then as many markers: say them in order.

    At the j-th marker the answer is the j-th data token. The markers are the last tokens of the
    row, so the data lies in the length - items before them, its places a subset drawn uniformly,
    its tokens independent and uniform. Only what looks at a token's content can tell which of
    the places to keep (Mamba, arXiv:2312.00752, section 4.1.1). ValueError for sizes that do not
    fit.
    """
    _check(length, 2 * items, f"items={items} and as many markers")
    _check(vocab, 3, "noise, the marker and data", "vocab")

    def draw(random):
        tokens, targets = np.full((2, length), NOISE, np.int32)
        places = np.sort(random.choice(length - items, items, replace=False))
        tokens[places] = random.integers(2, vocab, items)
        tokens[-items:], targets[-items:] = MARKER, tokens[places]
        return tokens, targets, np.arange(length) >= length - items

    return _stack(draw, key, rows)


def induction(
    key: Key, rows: Iterable[int], *, length: int, items: int = 1, vocab: int = 16
) -> Batch:
    """Ordinary tokens, `items` times among them the trigger, and last once more: what followed?

    One ordinary token follows the trigger wherever it stands, and is the answer, due at every
    trigger but the first. The places are a subset drawn uniformly of those that leave room. One
    item is the problem of Mamba (arXiv:2312.00752, section 4.1.2), with one answer a row; more of
    them teach it sooner, and from nearer: an answer stands at the trigger before, too. ValueError
    for sizes that do not fit.
    """
    _check(length, 2 * items + 1, f"items={items} triggers and answers, and the trigger again")
    _check(vocab, 3, "the trigger and two ordinary tokens", "vocab")

    def draw(random):
        tokens, targets = random.integers(1, vocab, length, np.int32), np.zeros(length, np.int32)
        room = length - 1 - items  # where each trigger and the token after it count as one
        places = np.sort(random.choice(room, items, replace=False)) + np.arange(items)
        answer = tokens[places[0] + 1]
        tokens[places], tokens[places + 1], tokens[-1] = TRIGGER, answer, TRIGGER
        due = np.append(places[1:], length - 1)
        targets[due] = answer
        return tokens, targets, np.isin(np.arange(length), due)

    return _stack(draw, key, rows)


def mqar(
    key: Key,
    rows: Iterable[int],
    *,
    length: int,
    pairs: int = 8,
    vocab: int = 128,
    alpha: float = 1.0,
) -> Batch:
    """Multi-query associative recall: key, value, key, value, ..., then keys: which values?

    Keys are distinct, each uniform; values uniform and independent. Each key is asked for once: the
    answer, due at the key, is its value. The places of the queries are drawn one after the other
    without replacement, place g = 0, 1, ... after the pairs with probability in proportion to
    (g + 1)^(alpha - 1): 1 is uniform, smaller ones a power law that asks soon, as in Zoology
    (arXiv:2312.04927, where alpha = 0.01); which key is asked for where is uniform. All else is
    filler. ValueError for sizes that do not fit.
    """
    _check(length, 3 * pairs, f"pairs={pairs} of two tokens and their queries")
    _check(vocab, 2 * pairs + 1, f"filler and a key and a value for each of pairs={pairs}", "vocab")
    many, begin = (vocab - 1) // 2, 2 * pairs
    chances = np.arange(1, length - begin + 1, dtype=np.float64) ** (alpha - 1)
    chances /= chances.sum()

    def draw(random):
        tokens, targets = np.full((2, length), FILLER, np.int32)
        keys = 1 + random.choice(many, pairs, replace=False)
        values = random.integers(many + 1, 2 * many + 1, pairs)
        tokens[0:begin:2], tokens[1:begin:2] = keys, values
        asked = begin + random.choice(length - begin, pairs, replace=False, p=chances)
        order = random.permutation(pairs)
        tokens[asked], targets[asked] = keys[order], values[order]
        return tokens, targets, np.isin(np.arange(length), asked)

    return _stack(draw, key, rows)


def _check(size: int, least: int, what: str, name: str = "length") -> None:
    if size < least:
        raise ValueError(f"{name}={size} has no room for {what}; it must be at least {least}")


def _stack(draw: Callable[[np.random.Generator], Row], key: Key, rows: Iterable[int]) -> Batch:
    made = [draw(np.random.default_rng((*key, row))) for row in rows]
    tokens, targets, due = (np.stack(part) for part in zip(*made, strict=True))
    reset = np.zeros(tokens.shape, bool)
    reset[:, 0] = True
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": due.astype(np.float32),
        "reset": reset,
    }
