"""Mamba recalls what followed a token, far beyond its training length (arXiv:2312.00752).

Models trained on rows of one length are asked at the end of rows of 64 to 8,192 tokens what
followed the trigger, a token that is the same in all rows, where it stood before.
"""

from pathlib import Path

import numpy as np

from ..datasets.recall import TRIGGER
from ..plots import panels
from ..tasks.recall import READ, TIMES, RecallTask
from ..trained import averaged, by, quickest, task_of
from . import Experiment, Measured, Setting, verdict

PRESET = "--preset recall-induction "
BEHIND = "--model.depth 4 --model.pattern conv,"  # two pairs, about as large as two of Mamba
MODELS = {
    "Mamba": "",
    "GLA": f"{BEHIND}gla",
    "Aaren": f"{BEHIND}aaren",
    "attention": f"{BEHIND}attention",
    "attention, no positions": f"{BEHIND}attention --model.attention.rope-base None",
}
SMALL = "--steps 2 --validate-every 0 --length 16 --items 2 --heldout-batches 1 --final-batches 1 "
SMALL += "--model.width 16 "
SHOWN = (64, 256, 1024, 8192)
HOLDS = 90  # per cent right, at least
COLUMNS = [
    "model",
    *(f"right at {n:,} tokens (%)" for n in SHOWN),
    f"spread at {SHOWN[-1]:,} (%)",
    "state after a training row (bytes)",
    "parameters",
    "time of the quickest run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    models = {name: f"{PRESET}{small}{own}".split() for name, own in MODELS.items()}
    rows, curves = [], {}
    for name, ended in setting.ended(models).items():
        curves[name] = averaged(by(each.found, "length") for each in ended)
        by_length = {int(n): (right, spread) for n, right, spread in curves[name]}
        spread = by_length[SHOWN[-1]][1] if len(ended) > 1 else None
        size, count = ended[0].found["state_bytes"], ended[0].final["parameters"]
        right = [by_length[n][0] for n in SHOWN]
        rows.append([name, *right, spread, size, count, quickest(ended)])
    made = task_of(models["Mamba"])
    notes = [
        f"Trained on {made.length} tokens, {made.rows} rows a step, which ask {made.items} times, "
        "all for one answer: that takes fewer steps than one question a row, but what is asked for "
        f"stood {distance(made):.0f} tokens before, on average. What is measured asks once, at the "
        f"end of each of {READ * TIMES} rows a length that no run trains on; guessing gives "
        f"{100 / (made.model.vocab - 1):.1f} %. The same AdamW, rows and steps for all.",
        "Mamba has a short convolution of its own; the blocks of the others follow one (LFM2's). "
        "The trigger is one token, so that no query need depend on what is read, and Aaren's do "
        "not. The settings were chosen in trials of Mamba with seed 0.",
    ]
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows, curves), "notes": notes} | {
        "curves": curves
    }


def distance(task: RecallTask) -> float:
    """Mean tokens from a trigger that asks back to the one before."""
    found = [
        np.diff(np.flatnonzero(row == TRIGGER)).mean()
        for step in range(32)
        for row in task.batches(0, step)["tokens"]
    ]
    return float(np.mean(found))


def answer(rows: list[list], curves: dict[str, list[list[float]]]) -> str:
    """From which length on Mamba does not recall, and how all do."""
    longest = len(SHOWN)
    failing = [n for n, right, _ in curves["Mamba"] if right < HOLDS]
    behind = [f"rows of {n:,.0f} tokens and more (Mamba under {HOLDS} % right)" for n in failing]
    return f"{verdict(behind[:1])}right at {SHOWN[1]} tokens and at {SHOWN[-1]:,} are " + ", ".join(
        f"{row[0]} {row[2]:.0f} and {row[longest]:.0f} %" for row in rows
    )


def draw(measured: Measured, path: Path) -> None:
    curves = {name: measured["curves"][name] for name in MODELS}
    panels.draw(
        path, [panels.Panel("induction", "tokens of a row", "right (%)", curves, "x", panels.SHARE)]
    )


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
