"""Pictures of forecasts against what came, and of curves by place in a sequence."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

Points = tuple[np.ndarray, np.ndarray]


def forecasts(truth: Points, ahead: Points, what: str, title: str) -> bytes:
    """A PNG of a series over years, and each row of forecasts over its own (rows, horizon)."""
    figure, axes = _axes(title)
    axes.plot(*truth, color="0.6", linewidth=1, label="measured")
    for i, (years, values) in enumerate(zip(*ahead, strict=True)):
        label = "forecast, each line from the value before it" if i == 0 else None
        axes.plot(years, values, color=f"C{i % 2}", linewidth=1.2, label=label)
    axes.set(xlabel="year", ylabel=what)
    return _png(figure, axes)


def curves(named: dict[str, Sequence[float]], x: str, y: str, title: str) -> bytes:
    """A PNG of curves over 1, 2, 3 and so on."""
    figure, axes = _axes(title)
    for name, values in named.items():
        axes.plot(range(1, len(values) + 1), values, linewidth=1.2, label=name)
    axes.set(xlabel=x, ylabel=y)
    return _png(figure, axes)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any, axes: Any) -> bytes:
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
