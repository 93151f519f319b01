"""Each operation beside a plain one, its other implementations and other libraries' kernels."""

import functools
import statistics
from collections.abc import Iterable

import jax
import numpy as np

from ...kernels import dispatch
from .. import bounds, timing
from . import peers, timed
from .prepared import Prepared, prepared
from .problems import Problem
from .table import Rows


def measure(
    op: str,
    problem: Problem,
    device: bounds.Device,
    rounds: Iterable[int],
    implementations: tuple[str, ...] = (),
    libraries: tuple[str, ...] = (),
    plain: bool = True,
) -> Rows:
    """A row of what dispatch chooses, of each implementation, of the plain one, of each library.

    All take turns. What cannot run here is a row that says why; figures "over ours" are times
    those of the first row, and an error is the root mean square of the difference from it, as a
    part of its own.
    """
    makers: timed.Makers = {op: (timed.Here, functools.partial(ours, problem))}
    for which in implementations:
        makers[f"{op} {which}"] = timed.Here, functools.partial(ours, problem, which)
    if plain:
        make = functools.partial(prepared, problem.plain, problem.arguments)
        makers[f"{op} plain"] = timed.Here, make
    for which in libraries:
        if op in peers.OPERATIONS.get(which, ()):
            make = functools.partial(peers.prepare, which, op, problem.arguments)
            for how, kind in timed.ways().items():
                makers[f"{op} {which}{how}"] = kind, make
    rows: Rows = {}
    with timed.made(makers, rows) as found:
        times = timing.turns(
            {
                (name, way): functools.partial(each.seconds, way)
                for name, each in found.items()
                for way in ("forward", "both")
            },
            rounds,
        )
    shapes = jax.eval_shape(problem.ours, *problem.arguments)
    least = bounds.least(device, problem.flops, problem.arguments, shapes)
    for name, each in found.items():
        rows[name] = {"implementation": each.about["implementation"]}
        for way, bound in zip(("forward", "both"), least, strict=True):
            spent, mine = times[name, way], times.get((op, way))
            rows[name] |= {
                f"{way}_ms": statistics.median(spent),
                f"{way}_ms_spread": timing.spread(spent),
                f"{way}_bound_ms": 1e3 * bound,
                f"{way}_over_ours": statistics.median(spent) / statistics.median(mine)
                if mine
                else None,
            }
        rows[name] |= each.about
        if op in found and name != op:
            rows[name]["error"] = difference(each.y, found[op].y)
    return rows


def ours(problem: Problem, implementation: str | None = None) -> Prepared:
    run = functools.partial(problem.ours, implementation=implementation)
    with dispatch.record() as record:
        found = prepared(run, problem.arguments)
    ran = ", ".join(dict.fromkeys(who for _, who in record))
    return found._replace(about=found.about | {"implementation": ran})


def difference(theirs: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((theirs - y) ** 2) / np.mean(y**2)))
