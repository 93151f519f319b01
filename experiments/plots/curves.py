"""A picture of one measure against another, such as accuracy by length."""

from collections.abc import Sequence

from .figure import begun, png


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
    figure, axes = begun(title)
    axes.plot(*zip(*points, strict=True), "o-", color="tab:blue", markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(-0.03, 1.03)
    if trained is not None:
        axes.axvline(trained, color="0.6", linewidth=0.8, linestyle="--")
        x += " (dashed: trained at)"
    axes.set(xlabel=x, ylabel=y)
    return png(figure)
