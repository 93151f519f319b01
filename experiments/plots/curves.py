"""A picture of one measure against another, such as accuracy by length."""

import io
from collections.abc import Sequence


def curve(
    points: Sequence[tuple[int, float]],
    x: str,
    y: str,
    title: str,
    trained: int | None = None,
) -> bytes:
    """A PNG of points whose x is at least 1, on a scale of doublings, y from 0 to 1.

    A dashed line stands at the x that the model was trained at.
    """
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o-", color="tab:blue", markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(-0.03, 1.03)
    if trained is not None:
        axes.axvline(trained, color="0.6", linewidth=0.8, linestyle="--")
        x += " (dashed: trained at)"
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
