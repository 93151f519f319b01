"""A picture of several panels that share their lines' labels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

SHARE = (0.0, 100.0)  # ends of an axis of per cent
MARKERS = "osD^vPXd<>"


class Panel(NamedTuple):
    """One pair of axes; a point of a line is (x, y), or (x, y, spread of y), which is shaded."""

    title: str
    x: str
    """What the horizontal axis is, with its unit."""
    y: str
    lines: Mapping[str, Sequence[Sequence[float]]]
    log: Literal["", "x", "xy"] = ""
    """Which axes are logarithmic: x by powers of two, y by powers of ten."""
    ends: tuple[float, float] = (-math.inf, math.inf)
    """Where y begins and ends by its nature, as shares do at 0 and 100: no spread goes beyond, and
    the axis begins at the first."""
    names: Sequence[str] = ()
    """What stands at x = 0, 1, ... where x is no measure; points are then not joined."""


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side, over one legend."""
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    figure = Figure(figsize=(5 * len(panels) + 1, 4.8), dpi=150, layout="constrained")
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    handles = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in panel.lines.items():
            number = labels.index(label)
            # later ones are smaller and thinner, so that of two that coincide both are seen
            size = 7 - 3 * number / max(len(labels) - 1, 1)
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            style = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)]}
            style |= {"markersize": size, "linewidth": size / 3.5}
            if panel.names:
                style["linestyle"] = "none"
            (handles[label],) = axes.plot(xs, ys, **style)
            if points and len(points[0]) > 2:
                low, high = (
                    [
                        min(max(y + sign * spread, panel.ends[0]), panel.ends[1])
                        for _, y, spread in points
                    ]
                    for sign in (-1, 1)
                )
                if panel.names:
                    axes.vlines(xs, low, high, color=f"C{number}")
                else:
                    axes.fill_between(xs, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        if "x" in panel.log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: short(x))
        if "y" in panel.log:
            axes.set_yscale("log")
        elif math.isfinite(panel.ends[0]):
            axes.set_ylim(bottom=panel.ends[0])
        if panel.names:
            axes.set_xticks(range(len(panel.names)), panel.names, rotation=30, ha="right")
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=4)
    figure.savefig(path, format="png")


def short(x: float) -> str:
    """`256`, `1k`, `64k`: a power of two."""
    return f"{x:,.0f}" if x < 1024 else f"{x / 1024:,.0f}k"
