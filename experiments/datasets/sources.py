"""A long row of tokens that knows where its documents begin, read by position."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """Tokens laid end to end as a circle: reading past the last goes on at the first.

    parts: arrays of integers, in memory or mapped. starts: positions of documents' first tokens,
    rising, the first 0. end: a token after which a new document starts (mapped arrays).
    bytes_per_token: UTF-8 bytes of text for each predicted token, so that mean nats / ln 2 /
    bytes_per_token are bits per byte with any tokenizer; None where the text is not known.
    """

    parts: tuple[np.ndarray, ...]
    starts: np.ndarray
    vocab: int
    end: int | None = None
    bytes_per_token: float | None = None
    name: str = "corpus"

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens from `position` on, as int32. Only these are read from a mapped array."""
        out, at = np.empty(count, np.int64), 0
        while at < count:
            here = (position + at) % len(self)
            part = int(np.searchsorted(self._offsets, here, side="right")) - 1
            first = here - int(self._offsets[part])
            piece = self.parts[part][first : first + count - at]
            out[at : at + len(piece)] = piece
            at += len(piece)
        wrong = (out < 0) | (out >= self.vocab)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"{self.name}: token {out[i]} at position {(position + i) % len(self)} is outside "
                f"the vocabulary of {self.vocab}"
            )
        return out.astype(np.int32)

    def window(self, position: int, length: int) -> dict[str, np.ndarray]:
        """tokens, targets, reset and weights, each (length,), from `position` on.

        reset marks each document's first token. The target of a document's last token would be the
        next document's first: its weight is 0, so nothing is learned or measured across documents.
        """
        tokens = self.read(position - 1, length + 2)
        index = (position + np.arange(length + 1)) % len(self)
        after = np.searchsorted(self.starts, index, side="right")
        first = self.starts[after - 1] == index
        if self.end is not None:
            first |= tokens[:-1] == self.end
        return {
            "tokens": tokens[1:-1],
            "targets": tokens[2:],
            "reset": first[:-1],
            "weights": (~first[1:]).astype(np.float32),
        }
