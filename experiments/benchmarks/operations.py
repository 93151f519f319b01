"""Each operation beside a plain one, its other implementations and other libraries' kernels."""

import functools
import statistics
from collections.abc import Callable, Iterable

import jax
import numpy as np

from ...kernels import dispatch
from .. import bounds, timing
from . import peers
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
    makers = {op: functools.partial(ours, problem)}
    for which in implementations:
        makers[f"{op} {which}"] = functools.partial(ours, problem, which)
    if plain:
        makers[f"{op} plain"] = functools.partial(prepared, problem.plain, problem.arguments)
    for which in libraries:
        if op in peers.OPERATIONS.get(which, ()):
            make = functools.partial(peers.prepare, which, op, problem.arguments)
            makers[f"{op} {which}"] = make
    found: dict[str, Prepared] = {}
    rows: Rows = {name: {} for name in makers}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (NotImplementedError, peers.Absent) as error:
            rows[name] = {"note": f"none: {error}"}
        except jax.errors.JaxRuntimeError as error:  # it does not fit this device, say
            rows[name] = {"note": f"none: {str(error).splitlines()[0]}"}
    times = timing.turns(calls(found), rounds)
    shapes = jax.eval_shape(problem.ours, *problem.arguments)
    least = bounds.least(device, problem.flops, problem.arguments, shapes)
    for name, each in found.items():
        rows[name] = {"implementation": each.about["implementation"]}
        for i, way in enumerate(("forward", "both")):
            spent, mine = times[name, i], times.get((op, i))
            rows[name] |= {
                f"{way}_ms": statistics.median(spent),
                f"{way}_ms_spread": timing.spread(spent),
                f"{way}_bound_ms": 1e3 * least[i],
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


def calls(found: dict[str, Prepared]) -> dict[tuple[str, int], Callable[[], float]]:
    """What says the seconds of a pass of each: 0 forward, 1 both."""
    return {
        (name, i): functools.partial(timing.seconds, call, each.wait)
        for name, each in found.items()
        for i, call in enumerate((each.forward, each.both))
    }


def difference(theirs: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((theirs - y) ** 2) / np.mean(y**2)))
