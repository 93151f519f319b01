"""Mamba copies data from among noise; without selection it cannot (Mamba, arXiv:2312.00752).

Two layers of Mamba, and the same with step size, B and C that do not depend on the input, are
trained alike: data tokens at random places among noise are to be said in their order.
"""

from pathlib import Path

from ..plots import panels
from ..trained import averaged, by, heldout, mean_and_spread, quickest, shown, task_of
from . import Experiment, Measured, Setting, verdict

PRESET = "--preset recall-selective-copying "
MODELS = {"Mamba": "", "Mamba without selection": "--model.mamba.no-selective"}
SMALL = "--steps 2 --validate-every 1 --length 16 --items 4 --heldout-batches 1 --final-batches 1 "
SMALL += "--model.width 16 --model.mamba.state 4 "
ABOVE, BELOW = 95, 50  # per cent right with selection, and without
COLUMNS = [
    "model",
    "answers right (%)",
    "spread (%)",
    "whole rows right (%)",
    "parameters",
    "time of the quickest run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    models = {name: f"{PRESET}{small}{own}".split() for name, own in MODELS.items()}
    rows, curves = [], {}
    for name, ended in setting.ended(models).items():
        right = mean_and_spread(100 * each.final["accuracy"] for each in ended)
        exact, _ = mean_and_spread(100 * each.final["exact"] for each in ended)
        rows.append([name, *right, exact, ended[0].final["parameters"], quickest(ended)])
        by_step = [heldout(each.run.folder, "accuracy") for each in ended]
        curves[f"{name} by step"] = averaged([(x, 100 * y) for x, y in one] for one in by_step)
        curves[f"{name} by item"] = averaged(by(each.found, "item") for each in ended)
    made = task_of(models["Mamba"])
    notes = [
        f"{made.items} data tokens of {made.length} in a row, {made.rows} rows a step; guessing "
        f"gives {100 / (made.model.vocab - 2):.1f} %. The same AdamW and steps for both; "
        "measured on rows that no run trains on. Without selection there are no projections that "
        "make step size, B and C, hence fewer parameters. The settings, the same for both, were "
        "chosen in trials of Mamba with these seeds, by the same rows."
    ]
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows), "notes": notes} | {
        "curves": curves
    }


def answer(rows: list[list]) -> str:
    failing = [f"{rows[0][0]} (under {ABOVE} % right)"] * (rows[0][1] < ABOVE)
    failing += [f"{rows[1][0]} (at least {BELOW} % right)"] * (rows[1][1] >= BELOW)
    right = ", ".join(f"{row[0]} {shown(row[1], row[2], 1)} %" for row in rows)
    return f"{verdict(failing)}answers right are {right}"


def draw(measured: Measured, path: Path) -> None:
    curves, right = measured["curves"], "held-out answers right (%)"
    by_step, by_item = ({n: curves[f"{n} by {x}"] for n in MODELS} for x in ("step", "item"))
    panels.draw(
        path,
        [
            panels.Panel("while training", "training step", right, by_step, ends=panels.SHARE),
            panels.Panel(
                "at the end", "number of the item in the row", right, by_item, ends=panels.SHARE
            ),
        ],
    )


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
