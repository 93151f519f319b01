"""Whole models beside other libraries': training steps, reading, and decoding."""

import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .. import bounds, timing
from . import model_peers, whole_models
from .memory import peak
from .peers import Absent
from .table import Row, Rows


def train(
    name: str,
    rows: int,
    length: int,
    rounds: Iterable[int],
    libraries: tuple[str, ...],
) -> Rows:
    """Logits of whole rows, and a training step: its gradients, AdamW, and what the trainer checks.

    Bounds, of ours alone, are products of weights at the rate of a large one, and our mixers'
    operations as they take alone, both measured in the same rounds.
    """
    config = whole_models.config(name)
    found, table = _made(
        name,
        functools.partial(whole_models.training, config, rows, length),
        functools.partial(model_peers.training, name=name, rows=rows, length=length),
        libraries,
    )
    calls: dict[Any, Callable[[], float]] = {}
    for label, model in found.items():
        for way in ("forward", "step"):
            calls[label, way] = functools.partial(timing.seconds, getattr(model, way), model.wait)
    for way, call in zip(
        ("forward", "step"), whole_models.mixing(config, rows, length), strict=True
    ):
        calls["mixing", way] = call
    calls["product"] = bounds.product()
    times = timing.turns(calls, rounds)
    flops = 1e3 * bounds.PRODUCT / statistics.median(times["product"])
    alone = [statistics.median(times["mixing", way]) for way in ("forward", "step")]
    least = whole_models.least(config, rows * length, flops, [t / 1e3 for t in alone])
    for label, model in found.items():
        row: Row = {"parameters": model.about.get("parameters")}
        for way, bound in zip(("forward", "step"), least, strict=True):
            row |= _timed(times[label, way], times[name, way], f"{way}_ms")
            if label == name:
                over = statistics.median(times[label, way]) / (1e3 * bound)
                row |= {f"{way}_bound_ms": 1e3 * bound, f"{way}_over_bound": over}
        row |= {"step_mixers_ms": alone[1]} if label == name else {}
        row |= {"peak_mb": peak(model.step, model.wait)}
        table[label] = row | model.about
    return table


def decode(
    name: str,
    rows: int,
    tokens: int,
    device: bounds.Device,
    rounds: Iterable[int],
    libraries: tuple[str, ...],
) -> Rows:
    """Greedy decoding of `tokens` tokens, of so many rows at once, after one token each.

    The bound is that of the bytes of weights and states.
    """
    config, label = whole_models.config(name), f"{name} B={rows}"
    found, table = _made(
        label,
        functools.partial(whole_models.decoding, config, rows, tokens),
        functools.partial(model_peers.decoding, name=name, rows=rows, tokens=tokens),
        libraries,
    )
    calls = {each: functools.partial(timing.seconds, made.decode) for each, made in found.items()}
    times = {
        each: [t / tokens for t in spent] for each, spent in timing.turns(calls, rounds).items()
    }
    for each, made in found.items():
        table[each] = _timed(times[each], times[label], "token_ms")
        table[each] |= {
            "token_bound_ms": 1e3 * whole_models.moved(config, rows, tokens) / device.memory,
            "tokens_per_s": 1e3 * rows / statistics.median(times[each]),
        }
        table[each] |= made.about
    return table


def _made(
    label: str, ours: Callable[[], Any], theirs: Callable[[str], Any], libraries: Iterable[str]
) -> tuple[dict[str, Any], Rows]:
    """What is there to be timed, and the rows' order with those of which there is none."""
    found, rows = {label: ours()}, {label: {}}
    name, _, rest = label.partition(" ")
    for library in libraries:
        if name in model_peers.LIBRARIES.get(library, ()):
            each = " ".join(filter(None, (name, library, rest)))
            rows[each] = {}
            try:
                found[each] = theirs(library)
            except Absent as error:
                rows[each] = {"note": f"none: {error}"}
    return found, rows


def _timed(spent: list[float], ours: list[float], column: str) -> Row:
    median = statistics.median(spent)
    return {
        column: median,
        f"{column}_spread": timing.spread(spent),
        f"{column.removesuffix('_ms')}_over_ours": median / statistics.median(ours),
    }
