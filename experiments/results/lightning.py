"""Chunkwise attention has one speed at every length (Lightning Attention-2, arXiv:2401.04658).

So has RetNet's chunkwise form (arXiv:2307.08621): its decays and Lightning's are two values of one
argument of one program. Three ways to y_t = sum_{s<=t} exp((t - s) log_decay) (q_t . k_s) v_s with
a constant decay a head, on as many tokens a run at every length: by chunks; by the states of all
tokens, an associative scan over T K V numbers a head; by the whole matrix of T T scores a head. The
two that need the most memory have fewer tokens, or one row of a longer length.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import tqdm

from ...kernels import linear_attention
from ...layers import decay
from .. import timing
from ..plots import panels
from ..trained import mean_and_spread
from . import FLAT, Experiment, Measured, Setting, verdict

LENGTHS = [2**n for n in range(8, 17)]
HEADS, WIDTH = 2, 64
ROUNDS, MOST = 3, 1e9  # timed runs of each for each seed, and bytes of a program that is run
COLUMNS = [
    "form",
    "length (tokens)",
    "rows",
    "forward (tokens/s)",
    "forward and backward (tokens/s)",
    "spread (%)",
    "forward (kB/token)",
    "forward and backward (kB/token)",
]


def matrix(q, k, v, log_decay):
    """The whole matrix of scores, each times the decay from s to t."""
    index = jnp.arange(q.shape[1], dtype=jnp.float32)
    between = index[:, None] - index
    seen = between >= 0
    weight = jnp.exp(jnp.where(seen, between, 0) * log_decay[:, None, None])
    product = functools.partial(jnp.einsum, precision="highest")
    scores = jnp.where(seen, product("bthk,bshk->bhts", q, k) * weight, 0)
    return product("bhts,bshv->bthv", scores, v)


def chunkwise(q, k, v, log_decay, implementation="xla"):
    return linear_attention(q, k, v, log_decay, implementation=implementation)[0]


states = functools.partial(chunkwise, implementation="associative")
RETNET = decay.retention(HEADS)
LIGHTNING = decay.lightning("released", HEADS, 0, 2)
FORMS = {
    "chunkwise, Lightning's decays": (chunkwise, LIGHTNING),
    "chunkwise, RetNet's decays": (chunkwise, RETNET),
    "states of all tokens": (states, RETNET),
    "whole matrix": (matrix, RETNET),
}
TOKENS = {chunkwise: LENGTHS[-1], states: 4096, matrix: 4096}  # of a run


def inputs(seed, rows, length, decays):
    keys = jax.random.split(jax.random.key(seed), 3)
    qkv = (jax.random.normal(key, (rows, length, HEADS, WIDTH), jnp.float32) for key in keys)
    return *qkv, jnp.asarray(decays, jnp.float32)


def forward(form):
    return form


def both(form):
    """Outputs and gradients; decays are constant."""

    def outputs_and_gradients(q, k, v, log_decay):
        return timing.both(lambda q, k, v: form(q, k, v, log_decay))(q, k, v)

    return outputs_and_gradients


WAYS = forward, both


def size(program):
    """Bytes of a compiled program's arguments, outputs and temporaries."""
    memory = program.memory_analysis()
    parts = "argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"
    return sum(getattr(memory, part) for part in parts)


def run(setting: Setting) -> Measured:
    lengths, tokens = (LENGTHS, TOKENS) if not setting.small else ([32], dict.fromkeys(TOKENS, 64))
    with timing.one_core():
        rows = measured(lengths, tokens, setting.seeds)
    return {"columns": COLUMNS, "rows": rows, "found": answer(rows), "notes": notes(rows, tokens)}


def measured(lengths: list[int], tokens: dict, seeds: tuple[int, ...]) -> list[list]:
    """A row a form and length: means over the seeds, of each the median of runs.

    All lengths take turns, so that a core that slows down slows all.
    """
    rows = {(form, length): max(1, tokens[form] // length) for form in tokens for length in lengths}
    programs = {
        (form, length, way): timing.compiled(way(form), inputs(0, number, length, RETNET))
        for (form, length), number in tqdm.tqdm(rows.items(), desc="lightning: compiled")
        for way in WAYS
    }
    bytes_ = {each: size(program) for each, program in programs.items()}
    speeds = {}
    with tqdm.tqdm(total=len(seeds) * ROUNDS, desc="lightning: rounds of all lengths") as bar:
        for seed in seeds:
            calls = {}
            for (name, (form, decays)), length in itertools.product(FORMS.items(), lengths):
                arguments = inputs(seed, rows[form, length], length, decays)
                for way in WAYS:
                    if bytes_[form, length, way] <= MOST:
                        call = functools.partial(programs[form, length, way], *arguments)
                        calls[name, length, way] = functools.partial(timing.seconds, call)
            for each, milliseconds in timing.medians(calls, timing.rounds(ROUNDS, bar)).items():
                speeds.setdefault(each, []).append(1e3 / milliseconds)
    found = []
    for (name, (form, _)), length in itertools.product(FORMS.items(), lengths):
        means, spread, total = [], None, rows[form, length] * length
        for way in WAYS:
            mean, deviation = None, None
            if (name, length, way) in speeds:
                mean, deviation = mean_and_spread(total * x for x in speeds[name, length, way])
                spread = deviation and 100 * deviation / mean
            means.append(mean)
        kilobytes = [bytes_[form, length, way] / 1e3 / total for way in WAYS]
        found.append([name, length, rows[form, length], *means, spread, *kilobytes])
    return found


def by_form(rows):
    return {name: [row for row in rows if row[0] == name] for name in FORMS}


def answer(rows) -> str:
    """The chunkwise form's speed over all lengths, forward and backward."""
    ours = by_form(rows)["chunkwise, Lightning's decays"]
    speeds = {row[1]: row[4] for row in ours}
    best, longest = max(speeds.values()), max(speeds)
    slow = ", ".join(f"{n:,}" for n, speed in speeds.items() if speed * FLAT < best)
    return (
        f"{verdict([f'rows of {slow} tokens'] if slow else [])}chunkwise "
        f"{min(speeds.values()):,.0f} to {best:,.0f} tokens/s forward and backward, at "
        f"{longest:,} tokens {speeds[longest] / best:.2f} of the best"
    )


def notes(rows, tokens) -> list[str]:
    """How it was measured, and where another form is faster."""
    forms = by_form(rows)
    said = [
        f"{HEADS} heads of {WIDTH} keys and {WIDTH} values, float32; of each seed the median of "
        f"{ROUNDS} runs, for which all lengths take turns. The spread is that of forward and "
        "backward where that was run.",
        f"By chunks a run has {tokens[chunkwise]:,} tokens at every length, more than caches hold; "
        "a few thousand, which they hold, are quicker. The other forms, for their memory, have "
        f"{tokens[matrix]:,} or one row of a longer length.",
        "Memory is what the compiler counts of the program: arguments, outputs and temporaries. "
        f"What counts more than {MOST / 1e9:.0f} GB was compiled and not run.",
    ]
    ours = {row[1]: row for row in forms["chunkwise, RetNet's decays"]}
    for name in ("states of all tokens", "whole matrix"):
        for column, way in ((3, "forward"), (4, "forward and backward")):
            faster = [
                f"{row[1]:,} ({row[column] / ours[row[1]][column]:.1f} times)"
                for row in forms[name]
                if row[column] and row[column] > FLAT * ours[row[1]][column]
            ]
            if faster:
                said.append(f"Faster than chunks, {way}: {name} at {', '.join(faster)} tokens.")
    return said


def draw(measured: Measured, path: Path) -> None:
    forms = by_form(measured["rows"])

    def lines(column, spread):
        return {
            name: [
                (row[1], row[column], *((row[5] or 0) / 100 * row[column],) * spread)
                for row in rows
                if row[column] is not None
            ]
            for name, rows in forms.items()
        }

    length = "length of a row (tokens)"
    ours, others = (rows[0][1] * rows[0][2] for rows in (*forms.values(),)[:: len(forms) - 1])
    speed = panels.Panel(
        f"speed: by chunks {ours:,} tokens a run, else {others:,}",
        *(length, "tokens per second, forward and backward", lines(4, True), "xy"),
    )
    memory = panels.Panel(
        "memory, forward and backward (compiled)", length, "kB per token", lines(7, False), "xy"
    )
    panels.draw(path, [speed, memory])


experiment = Experiment((__doc__ or "").partition("\n")[0], run, draw)
