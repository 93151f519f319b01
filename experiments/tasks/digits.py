"""Handwritten digits as a sequence of pixels, named after the last one."""

import dataclasses
import functools
from dataclasses import field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ...layers import router
from ...models import SeriesConfig, SeriesModel
from ..datasets.images import handwritten
from . import Batch, Metrics, Score
from .base import ModelTask, held, means, next_commands

PIXELS, CLASSES = 64, 10
TRAINING = 0.8  # of the images; the others are held out, the same ones in every run


@dataclasses.dataclass(frozen=True)
class DigitsTask(ModelTask):
    """The 1,797 images of scikit-learn (extra `datasets`), 8 rows of 8 pixels, row by row."""

    kind: ClassVar[type[Any]] = SeriesModel
    unit: ClassVar[str] = "images"
    measure: ClassVar[str] = "nats"

    rows: int = 32
    """Images a step."""
    model: SeriesConfig = field(default_factory=SeriesConfig)
    """The network; it reads a pixel, 0 to 1, and says a logit for each digit."""

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}; it must be at least 1")
        sizes = {"inputs": 1, "outputs": CLASSES, "length": PIXELS}
        object.__setattr__(self, "model", dataclasses.replace(self.model, **sizes))

    def check(self) -> None:
        images()

    def batches(self, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        x, labels = images()[0]
        draws = [np.random.default_rng((seed, step, row)) for row in range(self.rows)[rows]]
        index = np.array([int(r.integers(len(labels))) for r in draws])
        return {"x": x[index], "labels": labels[index], "weights": np.ones(len(index), np.float32)}

    def loss(
        self, model: SeriesModel, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Mean nats of the label at the last pixel, and what routers add; `accuracy`."""
        said, _, aux = model.said(batch["x"], key=key)
        labels, weights, logits = batch["labels"], batch["weights"], said[:, -1]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        right = (jnp.argmax(logits, axis=-1) == labels).astype(nll.dtype)
        weight = weights.sum()

        def mean(values):
            return (values * weights).sum() / jnp.where(weight, weight, 1)

        added, figures = router.losses(self.model.moe.router, aux)
        metrics = {"loss": mean(nll), "accuracy": mean(right), "weight": weight}
        return metrics["loss"] + added, (None, metrics | figures)

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Means over all held-out images."""
        firsts = range(0, len(images()[1][1]), self.rows)
        found = (score(partial(self._heldout, first), None)[0] for first in firsts)
        return means(found, ("loss", "accuracy"))

    def report(self, model: SeriesModel | None, heldout: dict[str, float], run: str) -> str:
        right = f"held-out images named right: {100 * heldout['accuracy']:.1f}%"
        return "\n".join([*next_commands(run, "evaluate", "train"), right])

    def _heldout(self, first: int, rows: slice = slice(None)) -> Batch:
        x, labels = images()[1]
        index, weights = held(len(labels), first, self.rows, rows)
        return {"x": x[index], "labels": labels[index], "weights": weights}


@functools.cache
def images() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Pixels (images, 64, 1) float32 from 0 to 1 and labels int32: to train on, and held out."""
    squares, labels = handwritten()
    order = np.random.default_rng(0).permutation(len(labels))
    x, labels = squares.reshape(-1, PIXELS, 1)[order], labels[order]
    count = int(TRAINING * len(order))
    return (x[:count], labels[:count]), (x[count:], labels[count:])
