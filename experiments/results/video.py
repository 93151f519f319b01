"""ConvS5 rolls out further than ConvLSTM and attention, at one time a frame (arXiv:2310.19694).

Models of equal size learn to predict the next frame of bouncing digits, and are rolled out: error
of held-out clips by horizon. And each, with random weights, generates frames: the time of one by
horizon.
"""

import math
from pathlib import Path

import numpy as np
from flax import nnx

from ...models import Video
from .. import rollouts, timing
from ..plots import panels
from ..trained import averaged, mean_and_spread, parameters, quickest, shown, task_of
from . import Experiment, Measured, Setting, verdict

PRESET = "--preset video-bouncing "
MODELS = {
    "ConvS5": "--model.pattern convs5",
    "ConvLSTM": "--model.pattern convlstm",
    # a window of 16 frames, so that roll-outs need no position that was never trained
    "attention": "--model.pattern attention+gelu --model.attention.window 1024",
}
SMALL = "--steps 2 --validate-every 0 --rows 2 --frames 4 --heldout-batches 1 --condition 4 "
SMALL += "--rollout 16 --rollouts 2 --model.width 8 --model.stages 8 --model.depth 1 "
HORIZONS = (1, 4, 16, 64)
TIMED = 256  # frames
WITHIN = 0.03
PLAIN = "the last frame, copied", "the mean of all frames"
COLUMNS = [
    "model",
    "better than the mean of all frames for (frames)",
    "spread (frames)",
    *(f"error {h} frame{'s' * (h > 1)} ahead" for h in HORIZONS),
    f"spread at {HORIZONS[-1]}",
    "time of frames 1 to 16 (ms/frame)",
    f"time of the last frames of {TIMED} (ms/frame)",
    "parameters",
    "time of the quickest run (s)",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    models = {name: f"{PRESET}{small}{own}".split() for name, own in MODELS.items()}
    tasks = {name: task_of(given) for name, given in models.items()}
    sizes = {name: parameters(task) for name, task in tasks.items()}
    for name, size in sizes.items():
        if not setting.small and abs(size / sizes["ConvS5"] - 1) > WITHIN:
            raise ValueError(f"{name} has {size:,} parameters, ConvS5 {sizes['ConvS5']:,}")
    runs = setting.ended(models)
    errors = {name: [each.found["rollout"]["mse"] for each in runs[name]] for name in runs}
    curves, times = {}, timed(tasks, setting)
    for name, ours in errors.items():
        curves[name] = averaged(list(enumerate(each["model"], 1)) for each in ours)
    first = errors["ConvS5"][0]
    for name in PLAIN:
        curves[name] = [(h, error) for h, error in enumerate(first[name], 1)]
    rows = []
    for name, ended in runs.items():
        at = [curves[name][min(h, len(curves[name])) - 1] for h in HORIZONS]
        spread = at[-1][2] if len(setting.seeds) > 1 else None
        reach = mean_and_spread(
            frames_below(each["model"], first[PLAIN[1]]) for each in errors[name]
        )
        ends = times[name][0][1], times[name][-1][1]
        rows.append(
            [name, *reach, *(x for _, x, _ in at), spread, *ends, sizes[name], quickest(ended)]
        )
    measured = {"columns": COLUMNS, "rows": rows, "curves": curves, "times": times}
    measured["pictures"] = {
        name: str(ended[0].run.folder / "film.png") for name, ended in runs.items()
    }
    found = answer(rows, curves[PLAIN[1]][-1][1])
    return measured | {"found": found, "notes": notes(tasks, curves)}


def frames_below(errors: list[float], others: list[float]) -> int:
    """How many frames of a roll-out, from its first, have less error than others."""
    worse = (h for h, pair in enumerate(zip(errors, others, strict=True)) if pair[0] >= pair[1])
    return next(worse, len(errors))


def timed(tasks: dict, setting: Setting) -> dict[str, list[list[float]]]:
    """By model (last frame of a segment, milliseconds a frame, spread over the seeds)."""
    curves = {}
    with timing.one_core():
        for name, task in tasks.items():
            clip = np.zeros((1, task.condition, *task.model.size, 1), np.float32)
            count, each = (task.rollout if setting.small else TIMED), []
            for seed in setting.seeds:
                model = Video(task.model, rngs=nnx.Rngs(seed))
                each.append(rollouts.seconds_per_frame(model, clip, count))
            curves[name] = []
            for same in zip(*each, strict=True):
                mean, spread = mean_and_spread(1e3 * seconds for *_, seconds in same)
                curves[name].append([float(same[0][1]), mean, spread or 0.0])
    return curves


def answer(rows: list[list], plain: float) -> str:
    """How far models are of use, their errors at the end, and how time grows with the horizon.

    `plain` is the error of the mean of all frames there.
    """
    at = len(HORIZONS) + 2
    ours, *others = (row[at] for row in rows)
    behind = [f"roll-outs of {HORIZONS[-1]} frames"] * (ours > min(others))
    reach = ", ".join(f"{row[0]} {shown(row[1], row[2], 1)}" for row in rows)
    errors = ", ".join(f"{row[0]} {row[at]:.3f}" for row in rows)
    growth = ", ".join(f"{row[0]} {row[at + 3] / row[at + 2]:.1f}" for row in rows)
    return (
        f"{verdict(behind)}better than the mean of all frames are the first frames of a roll-out: "
        f"{reach}; the squared error of a pixel {HORIZONS[-1]} frames ahead is {errors}, of the "
        f"mean of all frames {plain:.3f}; a frame at the end of {TIMED} takes so many times as "
        f"long as one of the first 16: {growth}"
    )


def notes(tasks: dict, curves: dict) -> list[str]:
    task, attention = tasks["ConvS5"], tasks["attention"].model
    window = attention.attention.window
    ends = {name: points[-1][1] for name, points in curves.items()}
    return [
        f"Digits of scikit-learn's, {task.digits} a clip, moving {task.speed} of their room a "
        f"frame, in frames of {task.model.size[0]} x {task.model.size[1]}, pixels from -1 to 1; "
        f"{task.rows} clips of {task.frames} frames a step, the same steps and AdamW for all. What "
        f"is measured is {task.condition} frames given and {task.rollout} generated, of digits "
        "that no run trains on. The settings were chosen in trials of ConvS5 with another seed; "
        "what more training and other sizes gave is in the preset's docstring.",
        f"A transformer's token sees itself and {window - 1:,} before it, "
        f"{window // math.prod(attention.frame)} frames, and no later place of its own frame, "
        "which convolutions see. Its cache has room for that window only.",
        "How long a roll-out is of use was added as a measure once the errors at the end were "
        "known: late frames whose digit has faded, as in the film strips, or stands in a wrong "
        "place, have more error than a blur. At the end the last frame, copied, has an error of "
        f"{ends[PLAIN[0]]:.3f}, the mean of all frames {ends[PLAIN[1]]:.3f}.",
        "Times are of one clip on one core, random weights, the quickest of "
        f"{rollouts.ROUNDS} calls, one model after another. The film strips are of one clip.",
    ]


def draw(measured: Measured, path: Path) -> None:
    errors = {
        name: [tuple(point) for point in points if point[0] in (1, 2, 4) or point[0] % 8 == 0]
        for name, points in measured["curves"].items()
    }
    times = {name: [tuple(p) for p in points] for name, points in measured["times"].items()}
    horizon, positive = "horizon (frames)", (0.0, math.inf)
    panels.draw(
        path,
        [
            panels.Panel(
                "error of roll-outs",
                horizon,
                "squared error of a pixel (-1 to 1)",
                errors,
                ends=positive,
            ),
            panels.Panel(
                "time of a generated frame", horizon, "milliseconds", times, "x", positive
            ),
        ],
    )


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
