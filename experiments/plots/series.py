"""Pictures of forecasts against what came, and of curves by place in a sequence."""

from collections.abc import Sequence

import numpy as np

from .figure import begun, png

Points = tuple[np.ndarray, np.ndarray]


def forecasts(truth: Points, ahead: Points, what: str, title: str) -> bytes:
    """A PNG of a series over years, and each row of forecasts over its own (rows, horizon)."""
    figure, axes = begun(title)
    axes.plot(*truth, color="0.6", linewidth=1, label="measured")
    for i, (years, values) in enumerate(zip(*ahead, strict=True)):
        label = "forecast, each line from the value before it" if i == 0 else None
        axes.plot(years, values, color=f"C{i % 2}", linewidth=1.2, label=label)
    axes.set(xlabel="year", ylabel=what)
    axes.legend()
    return png(figure)


def by_place(named: dict[str, Sequence[float]], x: str, y: str, title: str) -> bytes:
    """A PNG of curves over 1, 2, 3 and so on."""
    figure, axes = begun(title)
    for name, values in named.items():
        axes.plot(range(1, len(values) + 1), values, linewidth=1.2, label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    return png(figure)
