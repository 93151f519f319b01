"""Mamba recalls what followed a token, far beyond its training length (arXiv:2312.00752).

Models trained on rows of 256 tokens are asked at the end of rows of 64 to 8,192 what followed the
only other occurrence of the last token.
"""

from pathlib import Path

from ..plots import panels
from ..trained import Run, all_evaluated, all_trained, mean_and_spread
from . import Experiment, Measured, Setting
from .recall_copying import averaged

PRESET = "recall-induction"
MODELS = {
    "Mamba": "mamba",
    "GLA": "conv,gla",
    "Aaren": "conv,aaren",
    "attention": "conv,attention",
    "attention, no positions": "conv,attention --model.attention.rope-base None",
}
COMMON = "--save-every 0 --keep 1 --no-plot --no-tensorboard "
SMALL = "--steps 2 --validate-every 0 --length 16 --items 2 --heldout-batches 1 --final-batches 1 "
SMALL += "--model.width 16 "
SHOWN = (64, 256, 1024, 8192)
COLUMNS = [
    "model",
    *(f"right at {n:,} tokens (%)" for n in SHOWN),
    f"spread at {SHOWN[-1]:,} (%)",
    "state after 256 tokens (bytes)",
    "parameters",
    "time of a run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    runs = {
        (name, seed): Run(PRESET, tuple(given.split()), seed, folder)
        for seed in setting.seeds
        for name, own in MODELS.items()
        for given in [f"{COMMON}{small}--model.pattern {own}"]
        for folder in [setting.folder / f"{name.lower().replace(',', '').replace(' ', '-')}-{seed}"]
    }
    ends = dict(zip(runs, all_trained(list(runs.values()), setting.jobs), strict=True))
    folders = [each.folder for each in runs.values()]
    found = dict(zip(runs, all_evaluated(folders, at_once=setting.jobs), strict=True))
    rows, curves = [], {}
    for name in MODELS:
        mine = [each for each in runs if each[0] == name]
        curves[name] = averaged([found[each]["by_length"] for each in mine], "length")
        by_length = {int(n): (right, spread) for n, right, spread in curves[name]}
        spread = by_length[SHOWN[-1]][1] if len(mine) > 1 else None
        seconds, _ = mean_and_spread(ends[each]["seconds"] for each in mine)
        size, count = found[mine[0]]["state_bytes"], ends[mine[0]]["parameters"]
        rows.append([name, *(by_length[n][0] for n in SHOWN), spread, size, count, seconds])
    notes = [
        "Guessing gives 6.7 %. Training rows have the question eight times, which teaches the same "
        "in fewer steps; what is measured has it once, at the end of rows that no run trains on. "
        "The same AdamW, rows and steps for all; means over the seeds, the spread is the standard "
        "deviation over them. All but Mamba, which has a short convolution of its own, follow "
        "a block of one (LFM2's).",
    ]
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows), "notes": notes} | {
        "curves": curves
    }


def answer(rows: list[list]) -> str:
    longest = len(SHOWN)
    return f"right at 256 tokens and at {SHOWN[-1]:,}: " + ", ".join(
        f"{row[0]} {row[2]:.0f} and {row[longest]:.0f} %" for row in rows
    )


def draw(measured: Measured, path: Path) -> None:
    curves = {name: measured["curves"][name] for name in MODELS}
    length = "tokens of a row (trained at 256)"
    panels.draw(path, [panels.Panel("induction", length, "answers right (%)", curves, "x")])


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
