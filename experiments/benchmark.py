"""Time and temporaries of each operation against a plain one, in one run on this machine.

python -m scanax.experiments.benchmark
python -m scanax.experiments.benchmark --ops gla mamba --repeats 9 --out table.json
python -m scanax.experiments.benchmark --ops grouped-8 grouped-64 --batch 1 --length 1024
python -m scanax.experiments.benchmark --ops gla mamba2 --dtype bfloat16 --peers fla jla

The plain one is a scan token by token under automatic differentiation; for `attention` the whole
matrix of scores, for the grouped matmuls (8 or 64 experts share the rows) `jax.lax.ragged_dot`.

Figures are medians of runs that alternate with the baseline's, so that a machine that slows down
slows all; the ratio is to the baseline. Beside each stands the least time that its bytes or its
arithmetic take: by what is published of the device in bfloat16, else by what is measured of it in
float32. "both" is forward and backward. Peers are other libraries' kernels, on the same inputs.
"""

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # this folder's files must not shadow installed libraries

import dataclasses
import datetime
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from scanax.experiments import bounds, flags, peers, timing
from scanax.experiments.problems import Problem, problems
from scanax.kernels import attention, dispatch, grouped_matmul, linear_attention, selective_scan

Row = dict[str, str | float | None]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time operations against a plain implementation under automatic differentiation."""

    ops: tuple[str, ...] = ("gla", "mamba2", "mamba", "aaren", "attention", "grouped-8")
    """Which operations to time; retention and grouped-64 besides these."""
    batch: int = 2
    """Rows."""
    length: int = 2048
    """Tokens a row."""
    heads: int = 4
    """Heads."""
    width: int = 64
    """Features of a head's keys and values."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs; decays, steps and states are float32."""
    repeats: int = 5
    """Timed runs of each; the median is reported."""
    implementations: tuple[str, ...] = ()
    """Further rows by these implementations, besides the one that dispatch chooses: xla, ..."""
    peers: tuple[str, ...] = ()
    """Further rows by other libraries, with --dtype bfloat16: fla, jla."""
    baseline: bool = True
    """Whether the plain one runs: it takes the most memory, and on an accelerator the most time."""
    out: Path | None = None
    """A file to write the table to as JSON (none: print only)."""
    markdown: Path | None = None
    """A file to write the table to as Markdown, with the machine, JAX's version and the date."""


def main(args: list[str] | None = None) -> int:
    """0: done, whatever peer or implementation does not run here. 2: something given is wrong."""
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(Benchmark, None, args, "benchmark", __doc__ or "")
        check(config)
        report(config)
    except (ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def check(config: Benchmark) -> None:
    """Raise a ValueError that names the first flag that cannot be."""
    allowed = {
        "ops": problems(1, 1, 1, 1, config.dtype),
        "implementations": dict.fromkeys(
            name
            for op in (linear_attention, selective_scan, attention, grouped_matmul)
            for name in sys.modules[op.__module__].IMPLEMENTATIONS
        ),
        "peers": peers.INSTALL,
    }
    for flag, known in allowed.items():
        for name in getattr(config, flag):
            if name not in known:
                raise ValueError(f"--{flag} {name}: not one of {', '.join(known)}")
    for name in ("batch", "length", "heads", "width", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least 1")
    if config.peers and config.dtype != "bfloat16":
        raise ValueError("--peers: their kernels are for bfloat16; add --dtype bfloat16")
    for file in (config.out, config.markdown):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.absolute().parent}")


def report(config: Benchmark) -> None:
    """Print the table, and write it after each operation."""
    kind, (device, whose) = jax.devices()[0].device_kind, bounds.here()
    about = (
        f"{kind}, jax {jax.__version__}, {datetime.date.today()}, B={config.batch} "
        f"T={config.length} H={config.heads} K=V={config.width} {config.dtype}"
    )
    rates = (
        f"Bounds: {device.memory:.3g} bytes and {device.flops:.3g} operations a second ({whose})."
    )
    sizes = config.batch, config.length, config.heads, config.width
    chosen = problems(*sizes, jnp.dtype(config.dtype))
    table: dict[str, Row] = {}
    lines, notes = [], []
    print(f"{about}\n{rates}")
    for op in config.ops:
        rows, said = compare(op, chosen[op](), config, device)
        more = header(next(iter(rows.values()))) if rows and not lines else []
        more += [line(name, row) for name, row in rows.items()]
        said = [note for note in said if note not in notes]
        table, lines, notes = table | rows, lines + more, notes + said
        print("\n".join(more), flush=True)
        for note in said:
            print(note, file=sys.stderr, flush=True)
        if config.out:
            config.out.write_text(json.dumps({"device": kind, "ops": table}, indent=1))
        if config.markdown:
            below = "".join(f"\n- {note}" for note in notes)
            text = "\n".join([about, "", *lines, "", rates]) + "\n" + below + "\n" * bool(below)
            config.markdown.write_text(text)


def compare(
    op: str, problem: Problem, config: Benchmark, device: bounds.Device
) -> tuple[dict[str, Row], list[str]]:
    """The rows of an operation, and what is to be said of those that are not there."""
    wait, said = jax.block_until_ready, []
    calls, temporaries, ran, outputs = {}, {}, {}, {}

    def ready(name, run):
        with dispatch.record() as record:
            pair = [timing.compiled(f, problem.arguments) for f in (run, timing.both(run))]
        for program in pair:  # once before anything is noted of it
            wait(program(*problem.arguments))
        ran[name] = ", ".join(dict.fromkeys(who for _, who in record))
        temporaries[name] = pair[1].memory_analysis().temp_size_in_bytes / 1e6
        for i, program in enumerate(pair):
            call = functools.partial(program, *problem.arguments)
            calls[name, i] = functools.partial(timing.seconds, call, wait)

    def attempt(name, run, what):
        try:
            ready(name, run)
        except NotImplementedError as error:
            said.append(f"{what}: {error}")
        except jax.errors.JaxRuntimeError as error:  # it does not fit this device, say
            said.append(f"{what}: {str(error).splitlines()[0]}")

    attempt(op, problem.ours, op)
    for which in config.implementations:
        if which != ran.get(op):
            run = functools.partial(problem.ours, implementation=which)
            attempt(f"{op} {which}", run, f"{op} {which}")
    if config.baseline:
        attempt("", problem.plain, f"{op}, the plain one")
    for which in config.peers:
        try:
            peer = peers.prepare(which, op, problem.arguments)
        except peers.Absent as error:
            said.append(f"{which}: {error}")
            continue
        name = f"{op} {which}"
        ran[name], outputs[name] = peer.implementation, peer.output()
        if peer.temporaries is not None:
            temporaries[name] = peer.temporaries / 1e6
        for i, call in enumerate((peer.forward, peer.both)):
            calls[name, i] = functools.partial(timing.seconds, call, peer.wait)
    if outputs:
        y = np.asarray(jax.jit(problem.ours)(*problem.arguments)[0], np.float32)
        for name, theirs in outputs.items():
            error = np.sqrt(np.mean((theirs - y) ** 2) / np.mean(y**2))
            if not error < 0.02:
                said.append(f"{name}: its outputs differ from ours by {error:.2g} of their size")

    bar = tqdm.tqdm(range(config.repeats), desc=op, leave=False, disable=None)
    median = timing.medians(calls, bar)
    shapes = jax.eval_shape(problem.ours, *problem.arguments)
    least = bounds.least(device, problem.flops, problem.arguments, shapes)

    def figures(name: str) -> Row:
        return {
            "implementation": ran[name],
            "forward_ms": median[name, 0],
            "forward_bound_ms": 1e3 * least[0],
            "forward_ratio": ratio(median, (name, 0), ("", 0)),
            "both_ms": median[name, 1],
            "both_bound_ms": 1e3 * least[1],
            "both_ratio": ratio(median, (name, 1), ("", 1)),
            "temporaries_mb": temporaries.get(name),
            "temporaries_ratio": ratio(temporaries, name, ""),
        }

    return {name: figures(name) for name in ran if name}, said


def ratio(table: dict, key: Any, plain: Any) -> float | None:
    """To the baseline's figure, where there are both."""
    return table[key] / table[plain] if key in table and table.get(plain) else None


def header(row: Row) -> list[str]:
    """The names of a row's columns, as Markdown."""
    return ["| operation | " + " | ".join(row) + " |", "|---" * (len(row) + 1) + "|"]


def line(name: str, row: Row) -> str:
    """A row, as Markdown."""
    cells = ("" if x is None else x if isinstance(x, str) else f"{x:.3g}" for x in row.values())
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
