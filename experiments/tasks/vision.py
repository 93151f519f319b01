"""Classification of images: scikit-learn's digits, as large as the model's images are."""

import dataclasses
import functools
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ...layers import router
from ...models import Vision, VisionConfig, merge, split
from ...models.vision import patches
from ..datasets.images import resized, shifted
from ..plots.curves import curve
from . import Batch, Metrics, Score
from .base import ModelTask, held, means, next_commands
from .digits import images


@dataclasses.dataclass(frozen=True)
class VisionTask(ModelTask):
    """A classifier, and the images that it learns from."""

    kind: ClassVar[type[Vision]] = Vision
    unit: ClassVar[str] = "images"
    measure: ClassVar[str] = "nats"

    rows: int = 64
    """Images a step, all parts of an accumulated step together."""
    resize: Literal["linear", "nearest"] = "linear"
    """How 8 x 8 pixels are made as many as --model.image says: between neighbours, or copied."""
    shift: int = 0
    """Pixels, of the resized image, that a training image is moved by at most, along either axis;
    what it leaves is black."""
    model: VisionConfig = field(default_factory=VisionConfig)
    """The classifier."""

    def __post_init__(self):
        for name, least in (("rows", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {least}")
        if self.shift >= min(self.model.image):
            raise ValueError(f"shift={self.shift} moves an image of {self.model.image} out of it")
        if self.model.classes < 10:
            raise ValueError(f"model.classes={self.model.classes}; there are 10 digits")

    def check(self) -> None:
        images()  # says what is missing

    @functools.cached_property
    def data(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images (N, height, width) and labels: to train on, and to test on."""
        return [
            (resized(pixels.reshape(-1, 8, 8), self.model.image, self.resize), labels)
            for pixels, labels in images()
        ]

    def batches(self, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        """Every image once in as many rows as there are images, in a new order each time."""
        x, labels = self.data[0]
        count, numbers = len(labels), range(step * self.rows, (step + 1) * self.rows)[rows]
        which = np.array([order(count, seed, n // count)[n % count] for n in numbers])
        moved = np.random.default_rng((seed, step)).integers(
            -self.shift, self.shift, (self.rows, 2), endpoint=True
        )[rows]
        return self._batch(shifted(x[which], moved), labels[which])

    def _heldout(self, index: int, rows: slice = slice(None)) -> Batch:
        x, labels = self.data[1]
        which, weights = held(len(labels), index * self.rows, self.rows, rows)
        return self._batch(x[which], labels[which]) | {"weights": weights}

    def _batch(self, x: np.ndarray, labels: np.ndarray) -> Batch:
        """Patches (rows, patches, features) from -1 to 1, with labels and weights (rows,)."""
        pixels = np.repeat(2 * x[..., None] - 1, self.model.channels, axis=3)
        cut = np.asarray(patches(pixels, self.model.patch))
        weights = np.ones(len(labels), np.float32)
        return {"patches": cut, "labels": labels, "weights": weights}

    def loss(
        self, model: Vision, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Mean nats of the right class, and what routers add. `accuracy`: images that are right."""
        x, aux = model.hidden(batch["patches"], key)
        logits, weights = model.output(x), batch["weights"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)
        right = jnp.argmax(logits, axis=1) == batch["labels"]
        weight = weights.sum()
        loss, accuracy = (
            (x * weights).sum() / jnp.where(weight, weight, 1) for x in (nll[:, 0], right)
        )
        added, figures = router.losses(self.model.moe.router, aux)
        metrics = {"loss": loss, "accuracy": accuracy, "weight": weight} | figures
        return loss + added, (None, metrics)

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Mean loss and accuracy on all test images."""
        found = [score(partial(self._heldout, i), None)[0] for i in range(self.pieces)]
        return means(found, ("loss", "accuracy"))

    @property
    def pieces(self) -> int:
        """Batches that hold all test images."""
        return -(-len(self.data[1][1]) // self.rows)

    def examine(self, model: Vision, folder: Path | None) -> dict[str, Any]:
        """Accuracy after each row of patches, read one after another; early_exit.png shows it.

        Nothing for a model that has to see an image whole.
        """
        if not self.model.streams:
            return {}
        found = self.early_exit(model)
        if folder is not None:
            points = [(each["patches"], each["accuracy"]) for each in found]
            about = "patches read, row after row", "accuracy (share of test images)"
            png = curve(points, *about, f"scikit-learn's digits: {self.model.pattern}")
            (folder / "early_exit.png").write_bytes(png)
        return {"early_exit": found}

    def early_exit(self, model: Vision) -> list[dict[str, Any]]:
        """By the rows of patches read so far: accuracy on the test images."""
        graphdef, params, rest = split(model)

        @jax.jit
        def read(params, rest, patches, state):
            model: Any = merge(graphdef, params, rest)
            state = model.read(patches, state)
            return state, jnp.argmax(model.classify(state), axis=1)

        (rows, columns), right = self.model.grid, []
        for i in range(self.pieces):
            batch, state = self._heldout(i), model.init_state(self.rows)
            known = batch["weights"] > 0
            for row in range(rows):
                some = batch["patches"][:, row * columns : (row + 1) * columns]
                state, said = read(params, rest, some, state)
                right.append((row, (np.asarray(said) == batch["labels"])[known]))
        return [
            {
                "patches": (row + 1) * columns,
                "accuracy": float(np.concatenate([x for r, x in right if r == row]).mean()),
            }
            for row in range(rows)
        ]

    def report(self, model: Vision | None, heldout: dict[str, float], run: str) -> str:
        """What to type next, and the share of test images that are right."""
        right = f"test images right: {100 * heldout['accuracy']:.1f} %"
        return "\n".join([*next_commands(run, "evaluate", "train"), right])


@functools.lru_cache(maxsize=8)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch takes the images."""
    return np.random.default_rng((seed, epoch, count)).permutation(count)
