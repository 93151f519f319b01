"""Which numbers of a stored tensor are which of ours. One list of pieces serves both directions."""

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

ALL = slice(None)


class Piece(NamedTuple):
    """ours[at] = form(theirs[rows]), both of the first axis."""

    theirs: str
    """Name of a tensor in their files."""
    ours: str
    """Name of a parameter, as `by_layer` has it."""
    form: str = "same"
    """same; T: transposed, as torch keeps kernels; conv: (channels, 1, taps) to (taps, channels);
    squeeze: (a, 1, b) to (a, b)."""
    rows: Any = ALL
    """A slice of their first axis, or an array of its indices."""
    at: slice = ALL
    """A slice of our first axis."""
    other: str = ""
    """Another name that the tensor goes by in some files."""

    def among(self, names: Container[str]) -> "Piece":
        """This piece by the name of its tensor in these files."""
        known = self.theirs in names or self.other not in names
        return self if known else self._replace(theirs=self.other)


FORMS: dict[str, tuple[Callable, Callable]] = {  # from theirs to ours, and back
    "same": (lambda x: x, lambda x: x),
    "T": (lambda x: x.T, lambda x: x.T),
    "conv": (lambda x: x[:, 0].T, lambda x: x.T[:, None]),
    "squeeze": (lambda x: x[:, 0], lambda x: x[:, None]),
}
Shapes = dict[str, tuple[int, ...]]


def fused(theirs: str, form: str, parts: Iterable[tuple[str, int]]) -> Iterator[Piece]:
    """One of their tensors whose rows are those of several of ours, `(name, rows)`, in order."""
    first = 0
    for ours, count in parts:
        yield Piece(theirs, ours, form, slice(first, first + count))
        first += count


def kernels(at: str, to: str, names: dict[str, str], bias: bool = False) -> Iterator[Piece]:
    """Projections of one layer by their and our names, with biases or without."""
    for theirs, ours in names.items():
        yield Piece(f"{at}{theirs}.weight", f"{to}{ours}.kernel", "T")
        if bias:
            yield Piece(f"{at}{theirs}.bias", f"{to}{ours}.bias")


def their_shapes(pieces: Iterable[Piece], ours: Shapes) -> Shapes:
    """The shapes of their tensors, of those of our parameters."""
    shapes: Shapes = {}
    for piece in pieces:
        part = np.broadcast_to(np.int8(0), ours[piece.ours])[piece.at]  # no memory
        rows, *rest = FORMS[piece.form][1](part).shape
        before = shapes.get(piece.theirs, (0,))[0]
        shapes[piece.theirs] = (before + rows, *rest)
    return shapes


def by_name(pieces: Iterable[Piece], side: str) -> dict[str, list[Piece]]:
    """The pieces of each tensor; `side` is "ours" or "theirs"."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(getattr(piece, side), []).append(piece)
    return found


def to_ours(pieces: list[Piece], get: Callable[..., Any]) -> Any:
    """One of our parameters; get(name, rows) reads theirs."""
    parts = [FORMS[p.form][0](get(p.theirs, p.rows)) for p in pieces]  # in the order of `at`
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def to_theirs(pieces: list[Piece], shape: tuple[int, ...], get: Callable[[str], Any]) -> Any:
    """One of their tensors; get(name) reads one of our parameters."""
    whole = None
    for piece in pieces:
        part = FORMS[piece.form][1](get(piece.ours)[piece.at])
        whole = np.empty(shape, part.dtype) if whole is None else whole
        whole[piece.rows] = part
    return whole
