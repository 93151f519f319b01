"""What operations and layers ask of their arrays: how many axes they have, and what they hold."""

from typing import Any

FLOATS = ("bfloat16", "float16", "float32", "float64")


def floats(**arrays: tuple[Any, tuple[int, ...]]) -> None:
    """Raise a ValueError that names the first of (array, the numbers of axes it may have).

    Integers would be rounded back to integers after the sums, in silence; None is passed over.
    """
    for name, (x, axes) in arrays.items():
        if x is None:
            continue
        if not hasattr(x, "ndim"):
            raise ValueError(f"{name} is a {type(x).__name__}; it must be an array")
        if x.ndim not in axes:
            wanted = " or ".join(map(str, axes))
            raise ValueError(f"{name} has shape {x.shape}; it must have {wanted} axes")
        if x.dtype.name not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}; it must be one of {', '.join(FLOATS)}")


def mask(name: str, x: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless x is None or booleans of this shape.

    Numbers would count as the first token of a document wherever they are not 0.
    """
    if x is None:
        return
    if not hasattr(x, "ndim"):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be an array of bool")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}, not {shape}")
    if x.dtype.name != "bool":
        raise ValueError(f"{name} is {x.dtype}; it must be bool")


def axes(name: str, x: Any, letters: str) -> None:
    """Raise a ValueError unless x is an array of these axes, as "B T D", none but B empty."""
    wanted = f"({', '.join(letters.split())})"
    if not hasattr(x, "ndim"):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be an array {wanted}")
    if x.ndim != len(letters.split()) or 0 in x.shape[letters.startswith("B") :]:
        raise ValueError(f"{name} has shape {x.shape}; it must be {wanted}, each at least 1")


def stream(x: Any, reset: Any) -> None:
    """Raise a ValueError unless a layer is given x (B, T, D) and a reset (B, T) or None."""
    axes("x", x, "B T D")
    mask("reset", reset, x.shape[:2])


def size(what: str, number: Any) -> None:
    """Raise a ValueError unless a number of tokens is None or a whole number from 1 up."""
    if number is None:
        return
    if not hasattr(number, "__index__"):
        raise ValueError(f"{what}={number!r}; it must be a whole number")
    if number < 1:
        raise ValueError(f"{what}={number}; it must be at least 1")
