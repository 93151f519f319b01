"""When the next event comes and of which type: a simulated Hawkes process, as it is read."""

import dataclasses
import functools
import math
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...layers import router
from ...models import SeriesConfig, SeriesModel
from ..datasets import hawkes
from ..plots.series import by_place
from . import Batch, Metrics, Score
from .base import ModelTask, held, means, next_commands

TYPES = len(hawkes.CYCLE.base)
PARTS = {"training": 0, "validation": 1, "test": 2}
FIGURES = ("loss", "nats_time", "nats_type", "accuracy", "squared_error")


class Events(NamedTuple):
    """Sequences of one part: each token an event, its targets the one after it."""

    x: np.ndarray
    """(rows, length, 1 + types) float32: the logarithm of the wait for it, and which type it is."""
    waits: np.ndarray
    """(rows, length) float32: until the next event, in units of time."""
    types: np.ndarray
    """(rows, length) int32: the next event's."""
    oracle: tuple[np.ndarray, np.ndarray]
    """-log density of that time and -log probability of that type, by the process itself."""


@dataclasses.dataclass(frozen=True)
class EventsTask(ModelTask):
    """The process of experiments/datasets/hawkes.py; the same sequences in every run."""

    kind: ClassVar[type[Any]] = SeriesModel
    unit: ClassVar[str] = "events"
    measure: ClassVar[str] = "nats"

    rows: int = 32
    """Sequences a step."""
    length: int = 64
    """Events of a sequence that are read; the one after each is predicted."""
    sequences: int = 2048
    """Sequences to train on."""
    heldout: int = 256
    """Sequences of the validation part, and of the test part."""
    mixture: int = 4
    """Log-normal distributions that the wait's density is a mixture of (arXiv:1909.12127)."""
    model: SeriesConfig = field(default_factory=SeriesConfig)
    """The network; it reads a wait and a type and says the mixture's parameters and type's."""

    def __post_init__(self):
        for name in ("rows", "length", "sequences", "heldout", "mixture"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        sizes = {"inputs": 1 + TYPES, "outputs": 3 * self.mixture + TYPES, "length": self.length}
        object.__setattr__(self, "model", dataclasses.replace(self.model, **sizes))

    def batches(self, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        events, index = self._part("training"), range(self.rows)[rows]
        draws = [np.random.default_rng((seed, step, row)) for row in index]
        return _batch(events, np.array([int(r.integers(self.sequences)) for r in draws]))

    def loss(
        self, model: SeriesModel, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Mean nats of an event, of its time (a density, per unit of time) and type; and what
        routers add.

        Metrics: both parts; `accuracy`, the share of events whose likeliest type is right;
        `squared_error` of the expected wait.
        """
        said, _, aux = model.said(batch["x"], key=key)
        waits, types, weights = batch["waits"], batch["types"], batch["weights"][:, None]
        time, expected = log_normal(said[..., :-TYPES], waits, self._scale)
        chances = jax.nn.log_softmax(said[..., -TYPES:])
        of_type = -jnp.take_along_axis(chances, types[..., None], axis=-1)[..., 0]
        right = (jnp.argmax(chances, axis=-1) == types).astype(said.dtype)
        each = time + of_type, time, of_type, right, (expected - waits) ** 2
        weight = weights.sum() * waits.shape[1]
        metrics = {
            name: (value * weights).sum() / jnp.where(weight, weight, 1)
            for name, value in zip(FIGURES, each, strict=True)
        }
        added, figures = router.losses(self.model.moe.router, aux)
        return metrics["loss"] + added, (None, metrics | figures | {"weight": weight})

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Means over the validation part, at the end over the test part; `rmse` of the wait."""
        part, firsts = "test" if final else "validation", range(0, self.heldout, self.rows)
        each = (score(partial(self._heldout, part, first), None)[0] for first in firsts)
        found = means(each, FIGURES)
        return found | {"rmse": math.sqrt(found.pop("squared_error"))}

    def report(self, model: SeriesModel | None, heldout: dict[str, float], run: str) -> str:
        """Nats of the test part's events, beside the process itself and one of constant rates."""
        lines = ["nats per event of the test part, of its time and of its type:"]
        each = {name: [float(x.mean()) for x in nats] for name, nats in self.bounds().items()}
        each["model"] = [heldout["nats_time"], heldout["nats_type"]]
        lines += [
            f"{name:>22}: {time + type_:7.4f} = {time:7.4f} + {type_:.4f}"
            for name, (time, type_) in each.items()
        ]
        return "\n".join([*next_commands(run, "evaluate", "train"), *lines])

    def examine(self, model: SeriesModel, folder: Path | None) -> dict[str, Any]:
        """Nats by an event's place in its sequence, with those of the bounds; events.png."""
        events = self._part("test")
        said, _ = model(jnp.asarray(events.x))
        time, _ = log_normal(said[..., :-TYPES], jnp.asarray(events.waits), self._scale)
        chances = np.asarray(jax.nn.log_softmax(said[..., -TYPES:]))
        of_type = -np.take_along_axis(chances, events.types[..., None], axis=-1)[..., 0]
        each = {"model": (np.asarray(time), of_type)} | self.bounds()
        curves = {n: (time + type_).mean(axis=0).tolist() for n, (time, type_) in each.items()}
        if folder is not None:
            axes = "event's place in its sequence", "nats per event"
            png = by_place(curves, *axes, f"Hawkes process: {self.model.pattern}")
            (folder / "events.png").write_bytes(png)
        means = {name: float(np.mean(curve)) for name, curve in curves.items()}
        return {"nats_per_event": means, "nats_by_place": curves}

    def bounds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Nats of the test part's events (rows, length), of time and of type: by the process, and
        by rates that the training part has on average."""
        test, training = self._part("test"), self._part("training")
        rates = np.bincount(training.types.reshape(-1), minlength=TYPES) / training.waits.sum()
        known = hawkes.poisson(test.waits, test.types, rates)
        return {"the process itself": test.oracle, "constant rates": known}

    def _heldout(self, part: str, first: int, rows: slice = slice(None)) -> Batch:
        index, weights = held(self.heldout, first, self.rows, rows)
        return _batch(self._part(part), index) | {"weights": weights}

    def _part(self, name: str) -> Events:
        rows = self.sequences if name == "training" else self.heldout
        return simulated(PARTS[name], rows, self.length)

    @property
    def _scale(self) -> tuple[float, float]:
        """Mean and deviation of the training part's log waits."""
        log = np.log(self._part("training").waits)
        return float(log.mean()), float(log.std())


@functools.lru_cache(maxsize=8)
def simulated(part: int, rows: int, length: int) -> Events:
    rng = np.random.default_rng((2022, part))
    times, types = hawkes.simulate(hawkes.CYCLE, rows, length + 1, rng)
    waits = np.diff(times, axis=1, prepend=0.0)
    x = np.concatenate([np.log(waits)[..., None], np.eye(TYPES)[types]], axis=-1)
    time, type_ = hawkes.nats(hawkes.CYCLE, times, types)
    return Events(
        x[:, :-1].astype(np.float32),
        waits[:, 1:].astype(np.float32),
        types[:, 1:].astype(np.int32),
        (time[:, 1:], type_[:, 1:]),
    )


def log_normal(said: jax.Array, waits: jax.Array, scale: tuple[float, float]) -> tuple[Any, Any]:
    """-log density of waits under mixtures of log-normals, and the waits that they expect.

    said (..., 3 M): logits of the M weights, and of each part the mean and the log of the deviation
    of the logarithm, in deviations `scale[1]` from `scale[0]`.
    """
    mean, deviation = scale
    weights, means, logs = jnp.split(said, 3, axis=-1)
    weights, spread = jax.nn.log_softmax(weights), jnp.exp(logs)
    z = (jnp.log(waits) - mean) / deviation
    each = -0.5 * ((z[..., None] - means) / spread) ** 2 - logs - 0.5 * math.log(2 * math.pi)
    density = jax.nn.logsumexp(weights + each, axis=-1) - math.log(deviation) - jnp.log(waits)
    moment = mean + deviation * means + 0.5 * (deviation * spread) ** 2
    return -density, jnp.exp(jax.nn.logsumexp(weights + moment, axis=-1))


def _batch(events: Events, index: np.ndarray) -> Batch:
    batch = {"x": events.x[index], "waits": events.waits[index], "types": events.types[index]}
    return batch | {"weights": np.ones(len(index), np.float32)}
