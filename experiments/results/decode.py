"""A recurrent mixer's token costs one time and one state at every context (arXiv:2307.08621).

RetNet's O(1) decoding, of these mixers, Aaren (arXiv:2405.13956) among them, beside softmax
attention, whose cache grows. A model of each reads random tokens; from what it keeps before each
context it decodes to that context, a call a token, the state donated.
"""

import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from ...models import LM, LMConfig, merge, split
from .. import timing
from ..plots import panels
from ..saved_state import fitting
from ..trained import mean_and_spread
from . import FLAT, MIXER_NAMES, Experiment, Measured, Setting, verdict

MIXERS = ("gla", "retention", "lightning", "mamba", "mamba2", "aaren", "attention")
CONTEXTS = [2**n for n in range(6, 16)]
WIDTH, DEPTH = 256, 4
STEPS, CHUNK = 32, 512  # tokens timed in a row, and tokens read at once
WARM = 8  # tokens before those that are timed
WINDOW, ROUNDS = 0.3, 3  # seconds that rows are repeated for, and how often, for each seed
COLUMNS = [
    "mixer",
    "context (tokens)",
    "time (ms/token)",
    "spread (ms/token)",
    "time over the seed's mean",
    "spread of that",
    "state (kB)",
]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model's variables, its step, and its state after a context."""

    variables: Any
    step: Any
    """Compiled: (variables, tokens, state) -> (next tokens, state); the state is donated."""

    def seconds(self, token: Any, state: Any, steps: int) -> float:
        """Of a token: the median of rows of `steps` from this state, which stays.

        First WARM of them are not timed: they pay for what ran before, in caches and memory.
        """
        self.row(token, state, min(WARM, steps))
        spent = [self.row(token, state, steps)]
        while sum(spent) < WINDOW:
            spent.append(self.row(token, state, steps))
        return statistics.median(spent) / steps

    def row(self, token: Any, state: Any, steps: int) -> float:
        """Of a row of tokens."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        begun = time.perf_counter()
        for _ in range(steps):
            token, state = self.step(self.variables, token, state)
        jax.block_until_ready((token, state))
        return time.perf_counter() - begun


def decoder(config: LMConfig) -> tuple[LM, Decoder]:
    model = LM(config, rngs=nnx.Rngs(0))
    graphdef, params, rest = split(model)

    def step(variables, tokens, state):
        merged: Any = merge(graphdef, *variables)
        logits, state = merged(tokens, state)
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), state

    return model, Decoder((params, rest), jax.jit(step, donate_argnums=2))


def read(decoder: Decoder, tokens: Any, state: Any, small: int) -> tuple[Any, Any]:
    """The token that follows, and the state, after tokens that are read by chunks.

    What no whole chunks make is read by `small` at a time: two compiled shapes for all lengths.
    """
    at, following = 0, tokens[:, :1]
    while at < (length := tokens.shape[1]):
        size = small if (length - at) % CHUNK else CHUNK
        following, state = decoder.step(decoder.variables, tokens[:, at : at + size], state)
        at += size
    return following, state


def run(setting: Setting) -> Measured:
    contexts, width, depth, steps, mixers = CONTEXTS, WIDTH, DEPTH, STEPS, MIXERS
    if setting.small:
        contexts, width, depth, steps, mixers = [2, 4], 16, 1, 1, ("gla", "attention")
    with timing.one_core():
        models = {}
        for mixer in mixers:
            config = LMConfig(vocab=256, width=width, depth=depth, pattern=f"{mixer}+swiglu")
            models[mixer] = decoder(config)
        found = measured(models, contexts, steps, setting.seeds)
    rows = [[MIXER_NAMES[mixer], n, *found[mixer, n]] for mixer in mixers for n in contexts]
    return {
        "columns": COLUMNS,
        "rows": rows,
        "found": answer(rows),
        "notes": notes(rows, width, depth, steps, len(setting.seeds)),
    }


def reading(model: LM, decoder: Decoder, tokens: Any, contexts: list[int], steps: int):
    """(token that follows, state) `steps` before each context: of one stream, read once."""
    state, at = model.init_state(1, contexts[-1]), 0
    for context in contexts:
        token, state = read(decoder, tokens[:, at : context - steps], state, steps)
        at = context - steps
        expected = jax.eval_shape(lambda context=context: model.init_state(1, context))
        yield token, jax.tree.map(jnp.copy, tuple(map(fitting, state, expected)))


def measured(models: dict, contexts: list[int], steps: int, seeds: tuple[int, ...]) -> dict:
    """By mixer and context: milliseconds a token, their spread over the seeds, the same over the
    mean of all contexts of a seed, kB of state.

    All contexts take turns, so that a core that slows down slows all; what it slows down from seed
    to seed is no part of the ratios.
    """
    times, ratios, kilobytes = {}, {}, {}
    whole = len(seeds) * (len(models) + ROUNDS)
    with tqdm.tqdm(total=whole, desc="decode: streams read, then rounds of all") as bar:
        for seed in seeds:
            shape, calls = (1, contexts[-1]), {}
            tokens = jax.random.randint(jax.random.key(seed), shape, 0, 256, jnp.int32)
            for mixer, (model, decoder) in models.items():
                states = reading(model, decoder, tokens, contexts, steps)
                for context, (token, state) in zip(contexts, states, strict=True):
                    size = sum(x.nbytes for x in jax.tree.leaves(state))
                    kilobytes[mixer, context] = size / 1e3
                    decoder.row(token, state, 2)  # compiles
                    call = functools.partial(decoder.seconds, token, state, steps)
                    calls[mixer, context] = call
                bar.update()
            found = timing.medians(calls, timing.rounds(ROUNDS, bar))
            for mixer, context in found:
                mean = statistics.mean(found[mixer, n] for n in contexts)
                each, milliseconds = (mixer, context), found[mixer, context]
                times.setdefault(each, []).append(milliseconds)
                ratios.setdefault(each, []).append(milliseconds / mean)
    return {
        each: (*mean_and_spread(times[each]), *mean_and_spread(ratios[each]), kilobytes[each])
        for each in times
    }


def answer(rows) -> str:
    """How time and state differ over the contexts, of the recurrent mixers and of attention."""

    ratios, sizes = by_mixer(rows, 4), by_mixer(rows, 6)
    recurrent = {
        mixer: (max(ratios[mixer]) / min(ratios[mixer]), sizes[mixer][-1] / sizes[mixer][0])
        for mixer in ratios
    }
    longer, larger = recurrent.pop("attention")
    first, last = rows[0][1], rows[-1][1]
    times = [longer for longer, _ in recurrent.values()]
    failing = [mixer for mixer, (time, state) in recurrent.items() if time > FLAT or state > 1]
    return (
        f"{verdict(failing)}from {first:,} to {last:,} tokens of context the slowest token of a "
        f"recurrent mixer takes {min(times):.2f} to {max(times):.2f} times as long as its "
        f"quickest, and of the state {max(larger for _, larger in recurrent.values()):.0f} times "
        f"as much is kept; of attention {longer:.0f} and {larger:.0f} times"
    )


def by_mixer(rows, column: int) -> dict[str, list[float]]:
    """A column's figures by context, the shortest first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row[column])
    return found


def notes(rows, width, depth, steps, seeds) -> list[str]:
    """How it was measured, and where attention is faster or smaller."""
    said = [
        f"{depth} blocks of the mixer and SwiGLU, width {width}, 256 tokens, one row, float32, "
        f"random weights. The last {steps} tokens of the context are decoded again and again, from "
        f"a copy of the state before them, for {WINDOW} s, after {WARM} that are not timed; of the "
        f"times the median, and of each seed the median of {ROUNDS} turns that all mixers and "
        "contexts take. Each call has what it costs to begin one.",
        "The core's speed drifts from seed to seed, hence the spread; the ratios, to the mean over "
        "a seed's contexts, are without that.",
        "The state is all that goes from token to token: matrices, convolution windows, positions, "
        "and attention's cache, made for that context.",
    ]
    spreads = [row[5] for row in rows if row[0] != "attention" and row[5] is not None]
    if spreads:
        spread, contexts = statistics.median(spreads), len({row[1] for row in rows})
        draws = np.random.default_rng(0).normal(size=(10_000, contexts))
        chance = 1 + spread / seeds**0.5 * np.ptp(draws, axis=1).mean()
        ends = (
            f"{name} {mine[-1] / mine[0]:.2f}"
            for name, mine in by_mixer(rows, 4).items()
            if name != "attention"
        )
        said.append(
            f"A recurrent mixer's ratio has a spread of {spread:.2f}, in the middle: were all "
            f"contexts alike, the slowest of {contexts} would still take about {chance:.2f} times "
            f"as long as the quickest. The last context over the first: {', '.join(ends)}."
        )
    theirs = {row[1]: row for row in rows if row[0] == "attention"}
    for column, what in ((2, "quicker"), (6, "smaller")):
        parts = []
        for mixer in dict.fromkeys(row[0] for row in rows):
            wins = [r[1] for r in rows if r[0] == mixer and theirs[r[1]][column] < r[column]]
            if wins:
                parts.append(f"than {mixer} at " + ", ".join(f"{n:,}" for n in wins))
        if parts:
            said.append(f"Contexts, in tokens, at which attention is {what}: {'; '.join(parts)}.")
    return said


def draw(measured: Measured, path: Path) -> None:
    lines = [{row[0]: [] for row in measured["rows"]} for _ in range(2)]
    for mixer, context, milliseconds, spread, _, _, kilobytes in measured["rows"]:
        lines[0][mixer].append((context, milliseconds, spread or 0))
        lines[1][mixer].append((context, kilobytes))
    about = "context (tokens)"
    times = panels.Panel("time of a token", about, "milliseconds", lines[0], "xy")
    states = panels.Panel("state that is kept", about, "kilobytes", lines[1], "xy")
    panels.draw(path, [times, states])


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
