"""Plots of the tables that `benchmark` makes."""

from pathlib import Path
from typing import Any

from ..plots import bars, panels
from .table import Rows

# of a section: what is drawn, the bound beside it, what the axis says
BARS = {
    "ops": ("both_ms", "both_bound_ms", "forward and backward (ms)"),
    "models": ("step_ms", "step_bound_ms", "training step (ms)"),
    "decode": ("token_ms", "token_bound_ms", "a token of all rows (ms)"),
}


def draw(folder: Path, section: str, rows: Rows, title: str) -> None:
    """Draw SECTION.png; rows without figures are left out."""
    path = folder / f"{section}.png"
    if section == "lengths":
        _lengths(path, rows)
        return
    if section == "startup":
        _startup(path, rows, title)
        return
    figure, bound, y = BARS[section]
    groups: dict[str, dict[str, tuple[float, float | None]]] = {}
    for name, row in rows.items():
        height, tick = row.get(figure), row.get(bound)
        if isinstance(height, float):
            of, _, rest = name.partition(" ")
            *which, size = rest.rsplit(" ", 1) if "B=" in rest else (rest, "")
            group = groups.setdefault(f"{of} {size}".strip(), {})
            label = "".join(which) or "scanax"
            group[label] = height, tick if isinstance(tick, float) else None
    if groups:
        bars.draw(path, groups, title, y)


def _lengths(path: Path, rows: Rows) -> None:
    times: dict[str, list[Any]] = {}
    memory: dict[str, list[Any]] = {}
    for name, row in rows.items():
        if "both_us" in row:
            op, length = name.partition(" ")[0], row["length_tokens"]
            times.setdefault(op, []).append((length, row["both_us"], row["both_us_spread"]))
            memory.setdefault(op, []).append((length, row["temporaries_mb"]))
    if times:
        x = "tokens a row"
        left = panels.Panel("time of a token", x, "forward and backward (us)", times, "xy")
        right = panels.Panel("temporaries of a row", x, "forward and backward (MB)", memory, "xy")
        panels.draw(path, [left, right])


def _startup(path: Path, rows: Rows, title: str) -> None:
    labels = {"cold_s": "nothing kept", "warm_s": "compiled programs kept", "imports_s": "imports"}
    groups = {
        name: {label: (float(row[column] or 0), None) for column, label in labels.items()}
        for name, row in rows.items()
        if "cold_s" in row
    }
    if groups:
        bars.draw(path, groups, title, "to the first step (s)")
