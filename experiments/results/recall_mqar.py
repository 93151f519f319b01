"""What is recalled grows with the state; attention's cache recalls all (Zoology, arXiv:2312.04927).

Multi-query associative recall: key-value pairs, then keys whose values are to be said. Every mixer,
with states of several sizes, behind the same block of a short convolution.
"""

from pathlib import Path

import numpy as np

from ..plots import panels
from ..tasks.recall import RecallTask
from ..trained import averaged, by, mean_and_spread, quickest, task_of
from . import MIXER_NAMES, Experiment, Measured, Setting, verdict

PRESET = "--preset recall-mqar "
SIZES = {  # of states: by heads, which share the width, or by numbers per channel
    "gla": ("gla.heads", (16, 4, 1)),
    "retention": ("retention.heads", (16, 4, 1)),
    "lightning": ("lightning.heads", (16, 4, 1)),
    "mamba": ("mamba.state", (4, 16, 64)),
    "mamba2": ("mamba2.state", (8, 32, 128)),
    "aaren": ("aaren.heads", (4, 16)),
    "attention": ("attention.heads", (1,)),
}
SMALL = "--steps 2 --validate-every 0 --length 16 --items 4 --heldout-batches 1 --final-batches 1 "
SMALL += "--model.vocab 32 --model.width 16 --model.mamba2.head-width 16 "
GROWS = 5  # more per cent of the answers: less is none
COLUMNS = [
    "mixer",
    "size",
    "state (bytes)",
    "answers right (%)",
    "spread (%)",
    "each seed (%)",
    "parameters",
    "time of the quickest run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    sized = [
        (mixer, f"{flag} {size}")
        for mixer, (flag, sizes) in SIZES.items()
        for size in (sizes[-1:] if setting.small else sizes)
    ]
    models = {
        size: f"{PRESET}{small}--model.pattern conv,{mixer} --model.{size}".split()
        for mixer, size in sized
    }
    rows, curves = [], {}
    for (mixer, size), ended in zip(sized, setting.ended(models).values(), strict=True):
        each_right = [100 * each.final["accuracy"] for each in ended]
        right, spread = mean_and_spread(each_right)
        state, count, name = (
            ended[0].found["state_bytes"],
            ended[0].final["parameters"],
            MIXER_NAMES[mixer],
        )
        each = ", ".join(f"{one:.0f}" for one in each_right)
        rows.append([name, size, state, right, spread, each, count, quickest(ended)])
        curves.setdefault(f"{name} by state", []).append([state, right, spread or 0.0])
        # of the largest state, which comes last
        curves[f"{name} by pairs"] = averaged(by(each.found, "pairs") for each in ended)
    made = task_of(next(iter(models.values())))
    notes = [
        f"{made.items} pairs in {made.length} tokens, {made.rows} rows a step. Blocks of width "
        f"{made.model.width}: a short convolution (LFM2's), which makes one vector of a key and "
        "the value after it, and the mixer. The same AdamW and steps for all; measured on "
        "rows that no run trains on. The state is that of one row, convolutions' included, "
        "attention's cache as long as the row. Parameters are not equal: numbers of state "
        "per channel (Mamba, Mamba-2) bring some with them, and RetNet's values are twice "
        "as wide as the block. Aaren's state hardly grows with its heads, attention's not at all: "
        "of them a level is shown and no growth. By pairs: the largest state of each mixer, "
        f"trained on {made.items} pairs. The settings, the same for all, were chosen in trials of "
        "several mixers, by the same rows.",
        f"A row's likeliest value is right {by_value(made):.0f} times in 100: a run that stays "
        "there has not found the pairs in these steps, whatever its state could hold. Mamba reads "
        "keys, queries and values from the same convolved channels, Mamba-2 each from the block's "
        "input; what else was tried is in the preset's docstring.",
    ]
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows), "notes": notes} | {
        "curves": curves
    }


def by_value(task: RecallTask) -> float:
    """Per cent of the answers that are right if each is the value that its row has most of."""
    found = []
    for step in range(32):
        batch = task.batches(0, step)
        for targets, due in zip(batch["targets"], batch["weights"] > 0, strict=True):
            found.append(np.bincount(targets[due]).max() / due.sum())
    return 100 * float(np.mean(found))


def answer(rows: list[list]) -> str:
    """Of each mixer its smallest and its largest state; first those to which more is no help."""
    said, flat = [], []
    for name in map(MIXER_NAMES.__getitem__, SIZES):
        mine = sorted((row for row in rows if row[0] == name), key=lambda row: row[2])
        ends = dict.fromkeys((row[2], row[3]) for row in (mine[0], mine[-1]))
        said.append(f"{name} " + " and ".join(f"{y:.0f} % in {x:,} bytes" for x, y in ends))
        if mine[-1][2] >= 2 * mine[0][2] and mine[-1][3] < mine[0][3] + GROWS:
            flat.append(name)
    return f"{verdict(flat)}answers right are " + ", ".join(said)


def draw(measured: Measured, path: Path) -> None:
    curves, right = measured["curves"], "held-out answers right (%)"
    by_state, by_pairs = (
        {name: curves[f"{name} by {x}"] for name in map(MIXER_NAMES.__getitem__, SIZES)}
        for x in ("state", "pairs")
    )
    panels.draw(
        path,
        [
            panels.Panel(
                "by the size of the state", "bytes of state", right, by_state, "x", panels.SHARE
            ),
            panels.Panel(
                "by what is to recall", "key-value pairs", right, by_pairs, "x", panels.SHARE
            ),
        ],
    )


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
