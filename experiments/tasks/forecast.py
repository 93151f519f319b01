"""Forecasting of a real series: its next values, at every value of a window."""

import dataclasses
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from ...layers import router
from ...models import SeriesConfig, SeriesModel
from ..datasets import series
from ..plots.series import forecasts
from . import Batch, Metrics, Score
from .base import ModelTask, held, means, next_commands


@dataclasses.dataclass(frozen=True)
class ForecastTask(ModelTask):
    """One series; windows of a part at random to train, the rolling ones of another to measure."""

    kind: ClassVar[type[Any]] = SeriesModel
    unit: ClassVar[str] = "forecasts"
    measure: ClassVar[str] = "squared error"

    series: Literal["sunspots", "co2", "elnino", "unemployment", "inflation"] = "sunspots"
    """Of those that ship with statsmodels (extra `datasets`): experiments/datasets/series.py."""
    rows: int = 16
    """Windows a step."""
    context: int = 64
    """Values of a window."""
    horizon: int = 8
    """Values that are forecast at once."""
    lags: int = 16
    """Latest values that a token has, as a patch has them in PatchTST (arXiv:2211.14730)."""
    relative: bool = True
    """Whether a token's lags are read as differences from the latest one over their deviation, and
    what is said is as many deviations from there: the normalisation of an instance, of what each
    position has seen."""
    model: SeriesConfig = field(default_factory=SeriesConfig)
    """The network; it reads `lags` numbers and says `horizon`."""

    def __post_init__(self):
        for name in ("rows", "context", "horizon", "lags"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        sizes = {"inputs": self.lags, "outputs": self.horizon, "length": self.context}
        object.__setattr__(self, "model", dataclasses.replace(self.model, **sizes))

    def check(self) -> None:
        for part in ("training", "validation", "test"):
            self._origins(part)

    def batches(self, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        origins = self._origins("training")
        draws = [np.random.default_rng((seed, step, row)) for row in range(self.rows)[rows]]
        return self._windows(np.array([origins[int(r.integers(len(origins)))] for r in draws]))

    def loss(
        self, model: SeriesModel, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Mean square of the error, in deviations of the training part; and what routers add."""
        y, _, aux = model.said(batch["x"], key=key)
        error = y * batch["scale"][..., None] - batch["targets"]
        weights = batch["weights"]
        weight = weights.sum()

        def mean(errors):
            return (errors.mean(axis=-1) * weights).sum() / jnp.where(weight, weight, 1)

        added, figures = router.losses(self.model.moe.router, aux)
        metrics = {"loss": mean(error**2), "mae": mean(jnp.abs(error)), "weight": weight}
        return metrics["loss"] + added, (None, metrics | figures)

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Mean squared and absolute error of the rolling windows, each forecast from its last
        value: of the validation part, and at the end of the test part.
        """
        origins = self._origins("test" if final else "validation")
        firsts = range(0, len(origins), self.rows)
        each = (score(partial(self._rolling, origins, first), None)[0] for first in firsts)
        found = means(each, ("loss", "mae"))
        return found | {"mse": found["loss"]}

    def report(self, model: SeriesModel | None, heldout: dict[str, float], run: str) -> str:
        """Test errors, beside those of the last value and of the last season."""
        return "\n".join([*next_commands(run, "evaluate", "train"), *self._lines(heldout)])

    def examine(self, model: SeriesModel, folder: Path | None) -> dict[str, Any]:
        """The baselines' errors; forecast.png, forecasts of the test part against its values."""
        found = series.load(self.series)
        if folder is not None:
            origins = np.array(self._origins("test"))[:: self.horizon]
            batch = self._windows(origins)
            y, _ = model(jnp.asarray(batch["x"]))
            ahead = np.asarray(y, np.float64)[:, -1] * batch["scale"][:, -1:]
            ahead = ahead + found.values[origins][:, None] if self.relative else ahead
            first = found.ends[1] - self.context
            truth = np.arange(max(0, first), len(found.values))
            later = origins[:, None] + np.arange(1, self.horizon + 1)
            png = forecasts(
                (found.years(truth), found.measured(found.values[truth])),
                (found.years(later), found.measured(ahead)),
                found.kind.what,
                f"{self.series}: {self.model.pattern}, {self.horizon} values ahead",
            )
            (folder / "forecast.png").write_bytes(png)
        return {"baselines": series.naive(found, self.horizon, self.context)}

    def _lines(self, heldout: dict[str, float]) -> list[str]:
        found = series.naive(series.load(self.series), self.horizon, self.context)
        found |= {"model": {"mse": heldout["mse"], "mae": heldout["mae"]}}
        title = f"{self.series}, the test part, {self.horizon} values ahead"
        return [f"{title}:"] + [
            f"{name:>12}: mse {one['mse']:.4f}, mae {one['mae']:.4f}" for name, one in found.items()
        ]

    def _origins(self, part: str) -> range:
        return series.load(self.series).origins(part, self.context, self.horizon)

    def _windows(self, origins: np.ndarray) -> Batch:
        sizes = self.context, self.horizon, self.lags, self.relative
        batch = series.windows(series.load(self.series), origins, *sizes)
        return batch | {"weights": np.ones((len(origins), self.context), np.float32)}

    def _rolling(self, origins: range, first: int, rows: slice = slice(None)) -> Batch:
        """Rows of a batch of rolling windows, each asked at its last value only."""
        index, weights = held(len(origins), first, self.rows, rows)
        batch = self._windows(np.array(origins)[index])
        batch["weights"][:, :-1] = 0.0
        batch["weights"] *= weights[:, None]
        return batch
