"""What a request of lm-evaluation-harness means: windows over a text, and how to continue one."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .sampling import Choice

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
OPTIONS = {"until", "do_sample", "temperature", "top_k", "top_p", *LIMITS}


class Asked(NamedTuple):
    """A text to continue, and how."""

    prompt: np.ndarray
    how: Choice
    most: int
    until: tuple[str, ...]


def windows(tokens: np.ndarray, first: int, length: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Parts of a text, and from which token on each is scored: every token from `first` once.

    A part has `length` tokens and the one after them, so that the last one has context too.
    """
    for begin in range(first, len(tokens), length or max(1, len(tokens))):
        end = min(begin + (length or len(tokens)), len(tokens))
        start = max(0, end - 1 - length) if length else 0
        yield tokens[start:end], begin - start


def understood(options: dict[str, Any]) -> tuple[Choice, int, tuple[str, ...]]:
    """How to draw, how many tokens at most, and what ends a text; as the harness's own models."""
    if unknown := sorted(options.keys() - OPTIONS):
        raise ValueError(f"generation_kwargs has {', '.join(unknown)}, which scanax does not know")
    limits = {options[name] for name in LIMITS if options.get(name) is not None} or {256}
    most, until = limits.pop(), options.get("until") or []
    if limits or not isinstance(most, int) or most < 1:
        raise ValueError(f"generation_kwargs {options} does not name one number of tokens")
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(end, str) for end in until):
        raise ValueError(f"{until=} is not a list of strings")
    temperature, top_k, top_p = (options.get(name) for name in ("temperature", "top_k", "top_p"))
    sample = options.get("do_sample")
    if not (temperature if sample is None else sample):
        how = Choice(0.0)  # of one token there is nothing to choose from
    else:
        how = Choice(1.0 if temperature is None else float(temperature), top_k or 0, top_p or 1.0)
    least = how.temperature == 0 or 1e-30 <= how.temperature < math.inf
    if not (least and isinstance(how.top_k, int) and how.top_k >= 0 and 0 < how.top_p <= 1):
        raise ValueError(
            f"generation_kwargs {options} has a temperature, top_k or top_p of no sense"
        )
    return how, most, tuple(filter(None, until))
