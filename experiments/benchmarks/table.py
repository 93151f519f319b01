"""Rows of figures: as Markdown, and beside those of an earlier table."""

from collections.abc import Iterator

Row = dict[str, str | int | float | None]
"""By column: a figure, whose name ends with its unit; text; or None for what is not known."""
Rows = dict[str, Row]

COMPARED = ("_s", "_ms", "_us", "_mb")  # ends of names of what a change changes


def markdown(rows: Rows) -> list[str]:
    """The table; a spread stands behind its figure, and a column without any entry is left out."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    columns = [
        column
        for column in columns
        if not column.endswith("_spread")
        and any(row.get(column) is not None for row in rows.values())
    ]
    head = ["", *(column.replace("_", " ") for column in columns)]
    lines = [_line(head), "|---" * len(head) + "|"]
    for name, row in rows.items():
        lines.append(_line([name, *(_cell(row, column) for column in columns)]))
    return lines


def changes(new: Rows, old: Rows) -> Rows:
    """Of rows that both tables have of equal sizes, times and memory over what they were."""
    found: Rows = {
        name: dict(_ratios(row, old[name]))
        for name, row in new.items()
        if name in old and row.get("rows") == old[name].get("rows")
    }
    return {name: row for name, row in found.items() if row}


def _ratios(new: Row, old: Row) -> Iterator[tuple[str, float]]:
    for column, value in new.items():
        before = old.get(column)
        if not (isinstance(value, float | int) and isinstance(before, float | int) and before):
            continue
        known = column.endswith(COMPARED) and not column.endswith("_per_s")
        if known and "bound" not in column:
            yield column, value / before


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(row: Row, column: str) -> str:
    value, spread = row.get(column), row.get(f"{column}_spread")
    if value is None or isinstance(value, str):
        return value or ""
    return figure(value) + (f" ± {figure(spread)}" if isinstance(spread, float | int) else "")


def figure(value: int | float) -> str:
    """Three significant digits, and no exponent where a reader would not expect one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
