"""Mamba copies data from among noise; without selection it cannot (Mamba, arXiv:2312.00752).

Two layers of Mamba, and the same with step size, B and C that do not depend on the input, are
trained alike: data tokens at random places among noise are to be said in their order.
"""

from pathlib import Path

from ..plots import panels
from ..trained import Run, all_evaluated, all_trained, averaged, heldout, mean_and_spread
from . import Experiment, Measured, Setting

PRESET = "recall-selective-copying"
MODELS = {"Mamba": "", "Mamba without selection": "--model.mamba.no-selective"}
SMALL = "--steps 2 --validate-every 1 --length 16 --items 4 --heldout-batches 1 --final-batches 1 "
SMALL += "--model.width 16 --model.mamba.state 4 "
COLUMNS = [
    "model",
    "answers right (%)",
    "spread (%)",
    "whole rows right (%)",
    "parameters",
    "time of a run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    runs = {
        (name, seed): Run(PRESET, tuple(f"{small}{own}".split()), seed, folder)
        for seed in setting.seeds
        for name, own in MODELS.items()
        for folder in [setting.folder / f"{name.lower().replace(' ', '-')}-{seed}"]
    }
    ends = dict(zip(runs, all_trained(list(runs.values()), setting.jobs), strict=True))
    folders = [each.folder for each in runs.values()]
    found = dict(zip(runs, all_evaluated(folders, at_once=setting.jobs), strict=True))
    rows, curves = [], {}
    for name in MODELS:
        mine = [each for each in runs if each[0] == name]
        right = mean_and_spread(100 * ends[each]["accuracy"] for each in mine)
        exact, _ = mean_and_spread(100 * ends[each]["exact"] for each in mine)
        seconds, _ = mean_and_spread(ends[each]["seconds"] for each in mine)
        rows.append([name, *right, exact, ends[mine[0]]["parameters"], seconds])
        by_step = [heldout(runs[each].folder, "accuracy") for each in mine]
        curves[f"{name} by step"] = averaged([(x, 100 * y) for x, y in one] for one in by_step)
        curves[f"{name} by item"] = averaged(by(found[each], "item") for each in mine)
    task = next(iter(runs.values())).task
    notes = [
        f"{task.items} data tokens of {task.length} in a row, {task.rows} rows a step; guessing "
        f"gives {100 / (task.model.vocab - 2):.1f} %. The same AdamW and steps for both; means "
        "over the seeds, the spread is the standard deviation over them; measured on rows that no "
        "run trains on."
    ]
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows), "notes": notes} | {
        "curves": curves
    }


def by(evaluation: dict, over: str) -> list[tuple[float, float]]:
    """(x, % right) of a curve that `evaluate` finds of a run."""
    return [(float(point[over]), 100 * point["accuracy"]) for point in evaluation[f"by_{over}"]]


def answer(rows: list[list]) -> str:
    return "answers right: " + ", ".join(
        f"{row[0]} {row[1]:.1f} %" + (f" ± {row[2]:.1f}" if row[2] is not None else "")
        for row in rows
    )


def draw(measured: Measured, path: Path) -> None:
    curves, right = measured["curves"], "held-out answers right (%)"
    by_step, by_item = ({n: curves[f"{n} by {x}"] for n in MODELS} for x in ("step", "item"))
    panels.draw(
        path,
        [
            panels.Panel("while training", "training step", right, by_step),
            panels.Panel("at the end", "number of the item in the row", right, by_item),
        ],
    )


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
