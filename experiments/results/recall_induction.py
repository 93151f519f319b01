"""Mamba recalls what followed a token, far beyond its training length (arXiv:2312.00752).

Models trained on rows of one length are asked at the end of rows of 64 to 8,192 tokens what
followed the only other occurrence of the last token.
"""

from pathlib import Path

from ..plots import panels
from ..tasks.recall import READ, TIMES
from ..trained import Run, all_evaluated, all_trained, averaged, mean_and_spread
from . import Experiment, Measured, Setting
from .recall_copying import by

PRESET = "recall-induction"
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
    runs = {
        (name, seed): Run(PRESET, tuple(f"{small}{own}".split()), seed, folder)
        for seed in setting.seeds
        for name, own in MODELS.items()
        for folder in [setting.folder / f"{name.lower().replace(',', '').replace(' ', '-')}-{seed}"]
    }
    ends = dict(zip(runs, all_trained(list(runs.values()), setting.jobs), strict=True))
    folders = [each.folder for each in runs.values()]
    found = dict(zip(runs, all_evaluated(folders, at_once=setting.jobs), strict=True))
    rows, curves = [], {}
    for name in MODELS:
        mine = [each for each in runs if each[0] == name]
        curves[name] = averaged(by(found[each], "length") for each in mine)
        by_length = {int(n): (right, spread) for n, right, spread in curves[name]}
        spread = by_length[SHOWN[-1]][1] if len(mine) > 1 else None
        seconds, _ = mean_and_spread(ends[each]["seconds"] for each in mine)
        size, count = found[mine[0]]["state_bytes"], ends[mine[0]]["parameters"]
        rows.append([name, *(by_length[n][0] for n in SHOWN), spread, size, count, seconds])
    task = next(iter(runs.values())).task
    notes = [
        f"Trained on {task.length} tokens, {task.rows} rows a step, which ask {task.items} times: "
        "it teaches the same in fewer steps. What is measured asks once, at the end of each of "
        f"{READ * TIMES} rows a length that no run trains on; guessing gives "
        f"{100 / (task.model.vocab - 1):.1f} %. The same AdamW, rows and steps for all; means over "
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
