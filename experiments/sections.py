"""results.md: between markers a table of all measurements, and a section for each.

What stands before, between and after the markers belongs to whoever wrote it and is kept.
"""

import itertools
from collections.abc import Sequence

from .results import Measured

SUMMARY = "summary"
HEAD = """# Results

Figures are means over the seeds; a spread is the standard deviation over them.
"""


def spans(text: str, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Where the sections of these names lie, markers included; ValueError for damaged markers."""
    found = {}
    for name in names:
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        counts = text.count(first), text.count(last)
        if counts == (0, 0):
            continue
        begin, end = text.find(first), text.find(last)
        if counts != (1, 1) or end < begin:
            raise ValueError(
                f"the markers of {name} are damaged: {first} and {last} must stand once each, in "
                f"this order, or not at all; they stand {counts[0]} and {counts[1]} times"
            )
        found[name] = begin, end + len(last)
    ordered = sorted((begin, end, name) for name, (begin, end) in found.items())
    for (_, end, name), (begin, _, other) in itertools.pairwise(ordered):
        if begin < end:
            raise ValueError(f"the markers of {name} are damaged: {other} begins between them")
    return found


def replaced(text: str, name: str, body: str, names: Sequence[str]) -> str:
    """The text with this body between the markers of `name`.

    A section that is new comes after the last one that stands before it in `names`, else before the
    first one that stands after it, else at the end.
    """
    found, section = spans(text, names), f"<!-- {name} -->\n{body.strip()}\n<!-- /{name} -->"
    if name in found:
        begin, end = found[name]
        return text[:begin] + section + text[end:]
    index = list(names).index(name)
    if before := [other for other in names[:index] if other in found]:
        at = found[before[-1]][1]
        return f"{text[:at]}\n\n{section}{text[at:]}"
    if after := [other for other in names[index:] if other in found]:
        at = found[after[0]][0]
        return f"{text[:at]}{section}\n\n{text[at:]}"
    return f"{text.rstrip()}\n\n{section}\n"


def updated(text: str, all_measured: Sequence[Measured], names: Sequence[str]) -> str:
    """The text with the table of all and the section of each; `names` say their order."""
    order = [SUMMARY, *names]
    text = replaced(text or HEAD, SUMMARY, summary(all_measured), order)
    for measured in all_measured:
        text = replaced(text, measured["name"], section(measured), order)
    return text


def summary(all_measured: Sequence[Measured]) -> str:
    """A row a measurement: the claim, what was found, the command, and on what, when, how long."""
    columns = ["experiment", "claim", "found", "command", "machine", "time", "date"]
    rows = [
        [
            f"[{measured['name']}](#{measured['name']})",
            *(measured["claim"], measured["found"], f"`{measured['command']}`"),
            *(measured["machine"], clock(measured["seconds"]), measured["date"]),
        ]
        for measured in all_measured
    ]
    return table(columns, rows)


def section(measured: Measured) -> str:
    """Heading, claim, answer, how it was made, table, notes, plot, other pictures."""
    name, seeds = measured["name"], " ".join(map(str, measured["seeds"]))
    pictures = measured.get("pictures", {})
    made = f"{measured['machine']}; seeds {seeds}; {clock(measured['seconds'])}"
    parts = [
        f"## {name}",
        f"Claim: {measured['claim']}\n\nFound: {measured['found']}",
        f"`{measured['command']}`: {made}, {measured['date']}.",
        table(measured["columns"], measured["rows"]),
        "\n".join(f"- {note}" for note in measured.get("notes", [])),
        f"![{name}](results/{name}.png)",
        *(f"{label}:\n\n![{label}](results/{copy})" for label, copy in pictures.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *(list(map(cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Three significant digits of what is measured; what is not there is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        value = float(f"{value:.3g}")
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def clock(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
