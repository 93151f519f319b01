"""Aaren forecasts within 2 % of attention's error, in a state of one size (arXiv:2405.13956).

The same network with either mixer, trained alike: on real series, on a simulated Hawkes process and
on digits read pixel by pixel. And each, with random weights, reads a stream token by token: the
bytes of its state, and the time for all tokens up to a number of them.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...models import SeriesConfig, SeriesModel, merge, split
from .. import timing
from ..plots import panels
from ..trained import mean_and_spread, task_of
from . import MIXER_NAMES, Experiment, Measured, Setting, verdict

MIXERS = ("aaren", "attention")
SMALL = "--steps 2 --validate-every 0 --model.width 16 --model.depth 1 "
STEPS = {"sunspots": 200, "co2": 400, "elnino": 200, "unemployment": 200, "inflation": 100}
TASKS = {
    f"forecast {name}": (f"forecast --series {name} --steps {steps}", "mse")
    for name, steps in STEPS.items()
} | {
    "events": ("events-hawkes", "loss"),
    "digits": ("digits-sequence", "accuracy"),
}
WHAT = {"mse": "mean squared error", "loss": "nats per event", "accuracy": "share wrong"}
TOKENS = [2**n for n in range(6, 13)]
ROUNDS = 3
WITHIN = 0.02
COLUMNS = [
    "task",
    "measure",
    "Aaren",
    "spread of Aaren",
    "attention",
    "spread of attention",
    "Aaren over attention",
    "spread of that",
    "parameters of Aaren",
    "parameters of attention",
]


def run(setting: Setting) -> Measured:
    small = SMALL if setting.small else ""
    models = {
        f"{name} {mixer}": f"--preset {preset} {small}--model.pattern {mixer}+gelu".split()
        for name, (preset, _) in TASKS.items()
        for mixer in MIXERS
    }
    runs, rows = setting.ended(models, evaluate=False), []
    for name, (_, measure) in TASKS.items():
        found = {m: [each.final for each in runs[f"{name} {m}"]] for m in MIXERS}
        ours, theirs = ([error(end, measure) for end in found[m]] for m in MIXERS)
        ratio = mean_and_spread(a / b for a, b in zip(ours, theirs, strict=True))  # of a seed
        sizes = [found[mixer][0]["parameters"] for mixer in MIXERS]
        both = *mean_and_spread(ours), *mean_and_spread(theirs)
        rows.append([name, WHAT[measure], *both, *ratio, *sizes])
    curves = streams(TOKENS[:2] if setting.small else TOKENS, setting.seeds)
    measured = {"columns": COLUMNS, "rows": rows, "curves": curves}
    bounds = task_of(models["events aaren"]).bounds()
    return measured | {"found": answer(rows, curves), "notes": notes(curves, bounds)}


def error(end: dict[str, Any], measure: str) -> float:
    """Of a run at its end: less is better."""
    return 1 - end[measure] if measure == "accuracy" else end[measure]


def streams(lengths: list[int], seeds: tuple[int, ...]) -> dict[str, list[list[float]]]:
    """By `state of MIXER` (tokens, bytes) and `time of MIXER` (tokens, seconds, spread)."""
    curves: dict[str, list[list[float]]] = {}
    calls, spent = {}, {}
    with timing.one_core():
        for length in lengths:
            for mixer in MIXERS:
                model, program = reader(mixer, length)
                state = model.init_state(1, length)
                size = sum(x.nbytes for x in jax.tree.leaves(state))
                curves.setdefault(f"state of {mixer}", []).append([float(length), float(size)])
                calls[mixer, length] = functools.partial(program, *split(model)[1:], state)
        for seed in seeds:
            timed = {}
            for (mixer, length), call in calls.items():
                x = jax.random.normal(jax.random.key(seed), (length, 1, 1, 1), jnp.float32)
                call = functools.partial(call, x)
                timed[mixer, length] = functools.partial(timing.seconds, call)
            for each, milliseconds in timing.medians(timed, range(ROUNDS)).items():
                spent.setdefault(each, []).append(milliseconds / 1e3)
    for (mixer, length), times in spent.items():
        mean, spread = mean_and_spread(times)
        curves.setdefault(f"time of {mixer}", []).append([float(length), mean, spread or 0.0])
    return curves


def reader(mixer: str, length: int) -> tuple[Any, Any]:
    """A model, and (parameters, others, state, x (T, 1, 1, 1)) -> what it says, token by token."""
    config = dataclasses.replace(SeriesConfig(length=length), pattern=f"{mixer}+gelu")
    model = SeriesModel(config, rngs=nnx.Rngs(0))
    graphdef = split(model)[0]

    @jax.jit
    def program(params, rest, state, x):
        merged: Any = merge(graphdef, params, rest)

        def body(state, token):
            y, state = merged(token, state)
            return state, y

        return jax.lax.scan(body, state, x)[1]

    return model, program


def answer(rows: list[list], curves: dict[str, list[list[float]]]) -> str:
    """Ratios of errors, and how time and state grow."""

    def growth(what):
        first, *_, last = curves[what]
        return last[1] / first[1]

    errors = {row[0].removeprefix("forecast "): row[6] for row in rows if row[1] == WHAT["mse"]}
    events = next(row for row in rows if row[1] == WHAT["loss"])
    wrong = next(row for row in rows if row[1] == WHAT["accuracy"])
    first, last = curves["time of aaren"][0][0], curves["time of aaren"][-1][0]
    failing = [name for name, ratio in errors.items() if ratio > 1 + WITHIN]
    failing += ["the state"] * (growth("state of aaren") > 1)
    return (
        f"{verdict(failing)}Aaren's squared errors over attention's are "
        + ", ".join(f"{name} {ratio:.3f}" for name, ratio in errors.items())
        + f"; an event costs it {events[2]:.3f} nats, attention {events[4]:.3f}; it names "
        f"{100 * wrong[2]:.1f} % of digits wrong, attention {100 * wrong[4]:.1f} %; after "
        f"{last:,.0f} tokens its state is {growth('state of aaren'):.0f} times that after "
        f"{first:,.0f}, "
        f"attention's {growth('state of attention'):.0f} times; reading all of them takes "
        f"{growth('time of aaren'):,.0f} times as long, attention "
        f"{growth('time of attention'):,.0f} times"
    )


def notes(curves: dict[str, list[list[float]]], bounds: dict[str, Any]) -> list[str]:
    tokens, size = curves["state of aaren"][-1]
    slower = [
        int(n)
        for (n, ours, _), (_, theirs, _) in zip(
            curves["time of aaren"], curves["time of attention"], strict=True
        )
        if ours > theirs
    ]
    said = [
        "The same network around either mixer, the same AdamW and steps for both; what is compared "
        "is of the same seed. Series are cut in time: the last 20 % are measured, errors in "
        "deviations of the first 70 %; the steps of a series were chosen by the validation error "
        "of both mixers together, with another seed; rates and other settings in trials of Aaren. "
        "In which windows of a short series they differ is in the docstring of the preset "
        "forecast.",
        "Nats of an event of the Hawkes process's test part, to compare with: "
        + ", ".join(f"{name} {t.mean() + of.mean():.3f}" for name, (t, of) in bounds.items())
        + ".",
        f"Streams: one row, a token at a time within one compiled loop, {ROUNDS} runs for "
        "each seed, for which all lengths take turns; attention's cache is made for all tokens. "
        f"Aaren's state: {size:,.0f} bytes at {tokens:,.0f} tokens.",
    ]
    if slower:
        counts = ", ".join(f"{n:,}" for n in slower)
        said.append(f"Attention is sooner through streams of {counts} tokens.")
    return said


def draw(measured: Measured, path: Path) -> None:
    rows = [row for row in measured["rows"] if row[1] == WHAT["mse"]]
    ratios = {MIXER_NAMES["aaren"]: [(i, row[6], row[7] or 0.0) for i, row in enumerate(rows)]}
    ratios[MIXER_NAMES["attention"]] = [(i, 1.0, 0.0) for i in range(len(rows))]
    curves = {
        what: {MIXER_NAMES[m]: measured["curves"][f"{what} of {m}"] for m in MIXERS}
        for what in ("state", "time")
    }
    names, about = [row[0].removeprefix("forecast ") for row in rows], "tokens"
    error = panels.Panel("forecasts", "series", "error over attention's", ratios, names=names)
    panels.draw(
        path,
        [
            error,
            panels.Panel("state", about, "bytes", curves["state"], "xy"),
            panels.Panel("time of all tokens, one by one", about, "seconds", curves["time"], "xy"),
        ],
    )


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
