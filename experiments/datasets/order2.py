"""An order-2 byte model, the yardstick that training prints: what two bytes of context give."""

import numpy as np

from .sources import Source

_CHUNK = 1 << 22


def order2_bits_per_byte(train: Source, heldout: Source) -> float:
    """Bits per byte of a trigram byte model, trained on `train` and measured on `heldout`.

    Witten-Bell interpolation: p(c|ab) = (n(abc) + d(ab) p(c|b)) / (n(ab) + d(ab)), d the number of
    different bytes seen after ab, and so down to the uniform 1/256. The same bytes are predicted as
    by a model here: all but each document's first. Both sources must hold bytes.
    """
    if train.vocab != 256 or heldout.vocab != 256:
        raise ValueError(f"the order-2 model is over bytes, not a vocabulary of {train.vocab}")
    seen, asked = _counts(train), _counts(heldout)
    seen[1] += seen[2].reshape(256, -1).sum(0)
    seen[0] += seen[1].reshape(256, -1).sum(0)
    bits, lower = 0.0, np.full(1, 1 / 256)
    for order in range(3):
        n = seen[order]
        total = n.reshape(-1, 256).sum(1)
        kinds = np.count_nonzero(n.reshape(-1, 256), axis=1)
        # Of 16 million trigrams only those asked for; of the shorter ones all, to build on.
        code = np.flatnonzero(asked[2]) if order == 2 else np.arange(256 ** (order + 1))
        context, backed = code >> 8, lower[code % len(lower)]
        known = total[context] > 0
        divisor = np.where(known, total[context] + kinds[context], 1)
        lower = np.where(known, (n[code] + kinds[context] * backed) / divisor, backed)
        if order > 0:
            bits -= float((asked[order][code] * np.log2(lower)).sum())
    return bits / int(asked[1].sum() + asked[2].sum())


def _counts(source: Source) -> list[np.ndarray]:
    """Bytes counted by their longest context within the document, of 0, 1 or 2 bytes."""
    counts = [np.zeros(256 ** (order + 1), np.int64) for order in range(3)]
    for at in range(0, len(source), _CHUNK):
        start = max(at - 2, 0)
        x = source.read(start, min(at + _CHUNK, len(source)) - start)
        index = start + np.arange(len(x))
        age = index - source.starts[np.searchsorted(source.starts, index, side="right") - 1]
        for order in range(3):
            here = np.flatnonzero((index >= at) & (np.minimum(age, 2) == order))
            code = sum(x[here - back] << 8 * back for back in range(order + 1))
            counts[order] += np.bincount(code, minlength=len(counts[order]))
    return counts
