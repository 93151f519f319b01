"""A picture of groups of bars, a tick at what bounds each."""

from collections.abc import Mapping
from pathlib import Path

Bars = Mapping[str, tuple[float, float | None]]
"""By label: how high, and where the bound is, if there is one."""

WIDE = 30  # times the lowest


def draw(path: Path, groups: Mapping[str, Bars], title: str, y: str) -> None:
    """Draw a group of bars for each name; values that lie far apart on a scale of powers of ten."""
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    labels = list(dict.fromkeys(label for bars in groups.values() for label in bars))
    count = sum(map(len, groups.values()))
    figure = Figure(
        figsize=(3 + 0.3 * count + 0.3 * len(groups), 4.8), dpi=150, layout="constrained"
    )
    axes, handles, at, ticks = figure.subplots(), {}, 0.0, []
    values = [value for bars in groups.values() for bar in bars.values() for value in bar if value]
    for bars in groups.values():
        ticks.append(at + (len(bars) - 1) / 2)
        for label, (height, bound) in bars.items():
            color = f"C{labels.index(label)}"
            handles[label] = axes.bar(at, height, 0.9, color=color, bottom=0)
            if bound:
                (handles["bound"],) = axes.plot((at - 0.45, at + 0.45), (bound, bound), "k-")
            at += 1
        at += 1
    if max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(values) / 2)
    axes.set_xticks(ticks, list(groups), rotation=30, ha="right")
    axes.set(title=title, ylabel=y)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, format="png")
