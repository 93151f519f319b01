"""Plots of the tables that `benchmark` makes."""

from pathlib import Path

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
        _lengths(path, rows, title)
        return
    figure, bound, y = BARS[section]
    groups: dict[str, dict[str, tuple[float, float | None]]] = {}
    for name, row in rows.items():
        height, tick = row.get(figure), row.get(bound)
        if isinstance(height, float):
            of, _, rest = name.partition(" ")
            which, _, size = rest.rpartition("B=")
            group = groups.setdefault(f"{of} B={size}" if size and "B=" in rest else of, {})
            group[which.strip() or "scanax"] = height, tick if isinstance(tick, float) else None
    if groups:
        bars.draw(path, groups, title, y)


def _lengths(path: Path, rows: Rows, title: str) -> None:
    lines = [{}, {}]
    for name, row in rows.items():
        op = name.partition(" ")[0]
        length = row["length_tokens"]
        lines[0].setdefault(op, []).append((length, row["both_us"], row["both_us_spread"]))
        lines[1].setdefault(op, []).append((length, row["temporaries_mb"]))
    x = "tokens a row"
    time = panels.Panel("time of a token", x, "forward and backward (us)", lines[0], "xy")
    memory = panels.Panel("temporaries of a row", x, "forward and backward (MB)", lines[1], "xy")
    panels.draw(path, [time, memory])
