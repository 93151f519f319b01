"""lambda_k(t) = mu_k + sum_{t_j < t} a_{k, type_j} b exp(-b (t - t_j)): a Hawkes process.

Events of several types that excite each other, a_kl of them of type k for one of type l on average,
simulated exactly by thinning (Ogata 1981, doi:10.1109/TIT.1981.1056305), with its true likelihood.
Sequences begin before any event, at time 0. All arrays are float64, types int64.
"""

from typing import NamedTuple

import numpy as np


class Process(NamedTuple):
    """Its parameters."""

    base: np.ndarray
    """mu (types,), events per unit of time."""
    branching: np.ndarray
    """a (types, types): row the one that is excited, column the one that excites."""
    decay: float
    """b, per unit of time."""

    @property
    def ratio(self) -> float:
        """Events that one event causes in the long run's mix; below 1 for one that does not blow
        up: the largest absolute eigenvalue of the branching matrix."""
        return float(np.abs(np.linalg.eigvals(self.branching)).max())

    @property
    def rates(self) -> np.ndarray:
        """Mean events of each type per unit of time, long after the start: (1 - a)^-1 mu."""
        return np.linalg.solve(np.eye(len(self.base)) - self.branching, self.base)


# A cycle of four types with some of their own kind: what comes next is told by the latest events.
CYCLE = Process(
    base=np.array([0.10, 0.05, 0.05, 0.05]),
    branching=np.array(
        [
            [0.10, 0.00, 0.00, 0.60],
            [0.70, 0.10, 0.00, 0.00],
            [0.00, 0.70, 0.10, 0.00],
            [0.00, 0.00, 0.70, 0.10],
        ]
    ),
    decay=2.0,
)


def simulate(
    process: Process, rows: int, events: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Times and types (rows, events) of each row's first events.

    From where a row stands its intensity only falls until an event comes, so that it bounds itself:
    the next time is proposed at that rate and taken with the probability of what it has become.
    """
    base, branching, decay = process
    times, types = np.zeros((rows, events)), np.zeros((rows, events), np.int64)
    now, count, excited = np.zeros(rows), np.zeros(rows, np.int64), np.zeros((rows, len(base)))
    while (going := np.flatnonzero(count < events)).size:
        bound = (base + excited[going]).sum(axis=1)
        wait = rng.exponential(1 / bound)
        now[going] += wait
        excited[going] *= np.exp(-decay * wait)[:, None]
        within = np.cumsum(base + excited[going], axis=1)
        drawn = bound * rng.random(going.size)
        taken = drawn < within[:, -1]
        rows_, drawn = going[taken], drawn[taken]
        which = (drawn[:, None] >= within[taken]).sum(axis=1)
        times[rows_, count[rows_]], types[rows_, count[rows_]] = now[rows_], which
        excited[rows_] += decay * branching[:, which].T
        count[rows_] += 1
    return times, types


def nats(process: Process, times: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-log density of each event's time, and -log probability of its type then (rows, events).

    Given all before it: the integral of the whole intensity since the last event less its log at
    the event, and the log of its type's share of it.
    """
    base, branching, decay = process
    rows, events = times.shape
    found, last = np.zeros((2, rows, events)), np.zeros(rows)
    excited = np.zeros((rows, len(base)))
    for i in range(events):
        wait, which = times[:, i] - last, types[:, i]
        integral = base.sum() * wait + excited.sum(axis=1) * -np.expm1(-decay * wait) / decay
        excited = excited * np.exp(-decay * wait)[:, None]
        intensity = base + excited
        total = intensity.sum(axis=1)
        found[0, :, i] = integral - np.log(total)
        found[1, :, i] = -np.log(intensity[np.arange(rows), which] / total)
        excited, last = excited + decay * branching[:, which].T, times[:, i]
    return found[0], found[1]


def poisson(
    waits: np.ndarray, types: np.ndarray, rates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same of independent events at constant rates (types,), `waits` after each other."""
    total = rates.sum()
    return total * waits - np.log(total), -np.log(rates / total)[types]
