"""Mamba recalls what followed a token, far beyond its training length (arXiv:2312.00752).

Models trained on rows of one length are asked at the end of rows of 64 to 8,192 tokens what
followed the only other occurrence of the last token.
"""

from pathlib import Path

from ..plots import panels
from ..tasks.recall import READ, TIMES
from ..trained import averaged, mean_and_spread, task
from . import Experiment, Measured, Setting
from .recall_copying import by

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
COLUMNS = [
    "model",
    *(f"right at {n:,} tokens (%)" for n in SHOWN),
    f"spread at {SHOWN[-1]:,} (%)",
    "state after a training row (bytes)",
    "parameters",
    "time of a run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    models = {name: f"{PRESET}{small}{own}".split() for name, own in MODELS.items()}
    rows, curves = [], {}
    for name, ended in setting.ended(models).items():
        curves[name] = averaged(by(each.found, "length") for each in ended)
        by_length = {int(n): (right, spread) for n, right, spread in curves[name]}
        spread = by_length[SHOWN[-1]][1] if len(ended) > 1 else None
        seconds, _ = mean_and_spread(each.final["seconds"] for each in ended)
        size, count = ended[0].found["state_bytes"], ended[0].final["parameters"]
        rows.append([name, *(by_length[n][0] for n in SHOWN), spread, size, count, seconds])
    made = task(models["Mamba"])
    notes = [
        f"Trained on {made.length} tokens, {made.rows} rows a step, which ask {made.items} times: "
        "it teaches the same in fewer steps. What is measured asks once, at the end of each of "
        f"{READ * TIMES} rows a length that no run trains on; guessing gives "
        f"{100 / (made.model.vocab - 1):.1f} %. The same AdamW, rows and steps for all; means over "
        "the seeds, the spread is the standard deviation over them, on the same rows.",
        "Mamba has a short convolution of its own; the blocks of the others follow one (LFM2's).",
    ]
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows), "notes": notes} | {
        "curves": curves
    }


def answer(rows: list[list]) -> str:
    longest = len(SHOWN)
    return f"right at {SHOWN[1]} tokens and at {SHOWN[-1]:,}: " + ", ".join(
        f"{row[0]} {row[2]:.0f} and {row[longest]:.0f} %" for row in rows
    )


def draw(measured: Measured, path: Path) -> None:
    curves = {name: measured["curves"][name] for name in MODELS}
    panels.draw(path, [panels.Panel("induction", "tokens of a row", "right (%)", curves, "x")])


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
