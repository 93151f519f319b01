"""Real series that ship with statsmodels, cut in time into training, validation and test parts.

Normalised by the training part's mean and deviation. Where a value is missing (59 weeks of co2) the
one before it stands, so that no later value is seen early.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import numpy as np

PARTS = (0.7, 0.8)  # where the training part ends, and the validation part
LEAST = 0.05  # of a token's scale, where its values hardly differ


class Kind(NamedTuple):
    """A series: the data set of statsmodels and its columns, and what its numbers are."""

    dataset: str
    columns: str
    """One column, or the first and last of those of a row that follow each other in time."""
    what: str
    """With the unit."""
    start: float
    """The year of the first value."""
    per_year: float
    period: int
    """Values of a season: what the seasonal baseline repeats."""


KINDS = {
    "sunspots": Kind("sunspots", "SUNACTIVITY", "sunspots (number, yearly mean)", 1700, 1, 11),
    "co2": Kind("co2", "co2", "CO2 at Mauna Loa (ppm, weekly)", 1958.24, 52.18, 52),
    "elnino": Kind("elnino", "JAN:DEC", "sea surface temperature (°C, monthly)", 1950, 12, 12),
    "unemployment": Kind("macrodata", "unemp", "US unemployment (%, quarterly)", 1959, 4, 4),
    "inflation": Kind("macrodata", "infl", "US inflation (% a year, quarterly)", 1959, 4, 4),
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One number at a time, float64, in units of the training part's deviation from its mean."""

    kind: Kind
    values: np.ndarray
    ends: tuple[int, int]
    """Where the training part ends, and the validation part; the test part is the rest."""
    mean: float
    deviation: float

    def years(self, index: np.ndarray) -> np.ndarray:
        return self.kind.start + index / self.kind.per_year

    def measured(self, values: np.ndarray) -> np.ndarray:
        """Normalised values in the units of the series."""
        return values * self.deviation + self.mean

    def origins(self, part: str, context: int, horizon: int) -> range:
        """The last values of the windows whose `horizon` next ones are of that part, all of them.

        A training window lies in the training part whole. A window of another part reads what was
        before it, as a forecaster would have. ValueError if there is none.
        """
        first, last = self.ends
        begin, end = {
            "training": (context - 1, first),
            "validation": (first - 1, last),
            "test": (last - 1, len(self.values)),
        }[part]
        found = range(max(begin, context - 1), end - horizon)
        if not found:
            raise ValueError(
                f"context={context} and horizon={horizon} leave no window in the {part} part, "
                f"which ends at value {end} of {len(self.values)}"
            )
        return found


@functools.cache
def load(name: str) -> Series:
    """A series of `KINDS`. ValueError if statsmodels is not installed."""
    kind = KINDS[name]
    try:
        data: Any = importlib.import_module(f"statsmodels.datasets.{kind.dataset}")
    except ImportError:
        raise ValueError(
            "the package statsmodels is missing: pip install 'scanax[datasets]'"
        ) from None
    table, (first, _, last) = data.load_pandas().data, kind.columns.partition(":")
    table = table.loc[:, first : last or first].ffill()
    return cut(kind, table.to_numpy(np.float64).reshape(-1))


def cut(kind: Kind, values: np.ndarray) -> Series:
    """Cut in time and normalised by what the training part alone says."""
    first, last = (int(part * len(values)) for part in PARTS)
    mean, deviation = float(values[:first].mean()), float(values[:first].std())
    return Series(kind, (values - mean) / deviation, (first, last), mean, deviation)


def windows(
    series: Series, origins: np.ndarray, context: int, horizon: int, lags: int, relative: bool
) -> dict[str, np.ndarray]:
    """x (rows, context, lags), targets (rows, context, horizon) and scale (rows, context), float32.

    A token has the latest `lags` values, where the window's first one stands for those before it;
    the targets are the next `horizon` values at every position. If relative, a token's latest value
    is taken from both, its lags are divided by their deviation, the scale, and a forecast is to be
    multiplied by it.
    """
    time = np.asarray(origins)[:, None] - context + 1 + np.arange(context)
    seen = np.maximum(time[..., None] - np.arange(lags), time[:, :1, None])
    later = time[..., None] + np.arange(1, horizon + 1)
    x, targets, scale = series.values[seen], series.values[later], np.ones(time.shape)
    if relative:
        scale = np.sqrt(x.var(axis=-1) + LEAST**2)
        now = series.values[time][..., None]
        x, targets = (x - now) / scale[..., None], targets - now
    each = {"x": x, "targets": targets, "scale": scale}
    return {name: array.astype(np.float32) for name, array in each.items()}


def naive(series: Series, horizon: int, context: int) -> dict[str, dict[str, float]]:
    """Test errors of the last value, and of the values a season before: mse and mae."""
    period = series.kind.period
    origins = np.array(series.origins("test", context, horizon))[:, None]
    ahead = np.arange(1, horizon + 1)
    seasons = -(-ahead // period) * period
    found = {}
    for name, index in (("last value", origins), ("last season", origins + ahead - seasons)):
        error = series.values[index] - series.values[origins + ahead]
        found[name] = {"mse": float((error**2).mean()), "mae": float(np.abs(error).mean())}
    return found
