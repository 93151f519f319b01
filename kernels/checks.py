"""What every operation asks of its arrays: how many axes they have, and that they hold floats."""

from typing import Any

FLOATS = ("bfloat16", "float16", "float32", "float64")


def floats(**arrays: tuple[Any, tuple[int, ...]]) -> None:
    """Raise a ValueError that names the first of (array, the numbers of axes it may have).

    Integers would be rounded back to integers after the sums, in silence; None is passed over.
    """
    for name, (x, axes) in arrays.items():
        if x is None:
            continue
        if x.ndim not in axes:
            wanted = " or ".join(map(str, axes))
            raise ValueError(f"{name} has shape {x.shape}; it must have {wanted} axes")
        if x.dtype.name not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}; it must be one of {', '.join(FLOATS)}")


def size(what: str, number: Any) -> None:
    """Raise a ValueError unless a number of tokens is None or a whole number from 1 up."""
    if number is None:
        return
    if not hasattr(number, "__index__"):
        raise ValueError(f"{what}={number!r}; it must be a whole number")
    if number < 1:
        raise ValueError(f"{what}={number}; it must be at least 1")
