"""Whole models beside other libraries': training steps, reading, and decoding."""

import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .. import bounds, timing
from . import model_peers, timed, whole_models
from .table import Row, Rows


def train(
    name: str,
    rows: int,
    length: int,
    rounds: Iterable[int],
    libraries: tuple[str, ...],
) -> Rows:
    """Logits of whole rows, and a training step: its gradients, AdamW, and what the trainer checks.

    The bound, in all rows, is of ours: products of weights at the rate of a large one, and our
    mixers' operations as they take alone, both measured in the same rounds.
    """
    config = whole_models.config(name)
    makers = _makers(
        name,
        functools.partial(whole_models.training, config, rows, length),
        functools.partial(model_peers.training, name=name, rows=rows, length=length),
        libraries,
    )
    table: Rows = {}
    with timed.made(makers, table) as found:
        if name not in found:
            return {name: table[name]}
        calls: dict[Any, Callable[[], float]] = {
            (label, way): functools.partial(model.seconds, way)
            for label, model in found.items()
            for way in ("forward", "step")
        }
        for way, call in zip(
            ("forward", "step"), whole_models.mixing(config, rows, length), strict=True
        ):
            calls["mixing", way] = call
        calls["product"] = bounds.product()
        times = timing.turns(calls, rounds)
        peaks = {label: model.peak("step") for label, model in found.items()}
    flops = 1e3 * bounds.PRODUCT / statistics.median(times["product"])
    alone = [statistics.median(times["mixing", way]) for way in ("forward", "step")]
    least = whole_models.least(config, rows * length, flops, [t / 1e3 for t in alone])
    for label, model in found.items():
        row: Row = {"parameters": model.about.get("parameters")}
        for way, bound in zip(("forward", "step"), least, strict=True):
            row |= _timed(times[label, way], times[name, way], 1e3 * bound, f"{way}_ms")
        row |= {"step_mixers_ms": alone[1]} if label == name else {}
        table[label] = row | {"peak_mb": peaks[label]} | model.about
    return table


def decode(
    name: str,
    rows: int,
    tokens: int,
    rounds: Iterable[int],
    libraries: tuple[str, ...],
) -> Rows:
    """Greedy decoding of `tokens` tokens, of so many rows at once, after one token each.

    The bound is the time in which a matrix of as many bytes as weights and states have is read in
    the same rounds, again and again.
    """
    config, label = whole_models.config(name), f"{name} B={rows}"
    makers = _makers(
        label,
        functools.partial(whole_models.decoding, config, rows, tokens),
        functools.partial(model_peers.decoding, name=name, rows=rows, tokens=tokens),
        libraries,
    )
    table: Rows = {}
    with timed.made(makers, table) as found:
        if label not in found:
            return {label: table[label]}
        calls: dict[Any, Callable[[], float]] = {
            each: functools.partial(model.seconds, "decode") for each, model in found.items()
        }
        calls["reading"] = bounds.reading(whole_models.moved(config, rows, tokens))
        times = timing.turns(calls, rounds)
    bound = statistics.median(times.pop("reading"))
    times = {each: [t / tokens for t in spent] for each, spent in times.items()}
    for each, model in found.items():
        table[each] = _timed(times[each], times[label], bound, "token_ms")
        table[each] |= {"tokens_per_s": 1e3 * rows / statistics.median(times[each])}
        table[each] |= model.about
    return table


def _makers(
    label: str, ours: Callable[[], Any], theirs: Callable[[str], Any], libraries: Iterable[str]
) -> timed.Makers:
    """Ours, and each library that has the model, in the rows' order."""
    makers: timed.Makers = {label: (timed.Here, ours)}
    name, _, rest = label.partition(" ")
    for library in libraries:
        if name in model_peers.LIBRARIES.get(library, ()):
            make = functools.partial(theirs, library)
            for how, kind in timed.ways().items():
                each = " ".join(filter(None, (f"{name} {library}{how}", rest)))
                makers[each] = kind, make
    return makers


def _timed(spent: list[float], ours: list[float], bound: float, column: str) -> Row:
    """Milliseconds of one way that a model is used, over ours, and over our bound."""
    median, name = statistics.median(spent), column.removesuffix("_ms")
    return {
        column: median,
        f"{column}_spread": timing.spread(spent),
        f"{name}_over_ours": median / statistics.median(ours),
        f"{name}_bound_ms": bound,
        f"{name}_over_bound": median / bound,
    }
