"""Time and memory of operations and models here, beside bounds and other libraries.

python -m scanax.experiments.benchmark
python -m scanax.experiments.benchmark --ops gla mamba --repeats 9
python -m scanax.experiments.benchmark --ops --dtype bfloat16 --implementations xla
python -m scanax.experiments.benchmark --models mamba2 llama --decode 1 8
python -m scanax.experiments.benchmark --lengths 8192 65536
python -m scanax.experiments.benchmark --startup 4 8 16
python -m scanax.experiments.benchmark --compare before/benchmark.json --out runs/after

--ops, --models, --decode, --lengths and --startup choose what is measured, alone they mean all of
theirs; without any of them all is. Figures are medians of runs that take turns, so that a machine
that slows down slows all, ± half of what the middle half of them differ by. "both" is forward and
backward, "over ours" times as long as ours. Bounds of operations are the least time that their
bytes or their arithmetic take: by what is published of the device in bfloat16, else by what is
measured of it in float32. Those of models are of ours, by rates measured in the same rounds:
another library's time over that bound is how many times as quick as it ours can be at most, where
weights come from memory.

Like all commands here it asks for large pages, which quicken other libraries too where they
allocate much. Their own programs do not ask: where Linux gives such pages to who asks, a second row
of each library ("small pages") is of a process that did not. GLIBC_TUNABLES=glibc.malloc.hugetlb=0
before the command: small pages for all.

Peers are other libraries, each of which may be missing: fla (flash-linear-attention, on CUDA), jla
(jax-linear-attention), transformers, torchscale; `pip install scanax[bench]` brings what of them
installs beside any JAX. "plain" is a scan token by token under automatic differentiation; for
`attention` the whole matrix of scores, for the grouped matmuls `jax.lax.ragged_dot`.
"""

import sys

from scanax.experiments import starting

starting.begin(__name__)

import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tqdm
from scanax.experiments import bounds, files, flags, timing
from scanax.experiments.benchmarks import (
    lengths,
    models,
    operations,
    peers,
    pictures,
    startup,
    whole_models,
)
from scanax.experiments.benchmarks.problems import problems
from scanax.experiments.benchmarks.table import Rows, changes, markdown
from scanax.kernels import (
    attention,
    diagonal_scan,
    grouped_matmul,
    linear_attention,
    selective_scan,
)
from scanax.sharding import mesh

KERNELS = (linear_attention, selective_scan, attention, diagonal_scan, grouped_matmul)
TITLES = {
    "ops": "Operations",
    "models": "Training models",
    "decode": "Decoding",
    "lengths": "Lengths",
    "startup": "Start-up",
}
FILE = "benchmark.json"
DEPTHS = (4, 8, 16)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time operations and models beside their bounds and other libraries."""

    ops: tuple[str, ...] | None = None
    """Operations: gla, mamba2, retention, mamba, aaren, convs5, attention, grouped-8, ..."""
    models: tuple[str, ...] | None = None
    """Models, whose training steps are timed: mamba, mamba2, llama, mixtral, retnet, gla,
    lightning, aaren; 4 blocks, width 256, 256 tokens."""
    decode: tuple[int, ...] | None = None
    """Rows at once with which these models (all, without --models) decode."""
    lengths: tuple[int, ...] | None = None
    """Tokens a row, at which the operations (without --ops all whose state does not grow) are
    timed on equal numbers of tokens."""
    startup: tuple[int, ...] | None = None
    """Blocks of a model, at which a `train` command is timed from its beginning to its first step:
    with no compiled programs kept, and with those of the run before; each --repeats times."""
    batch: int = 2
    """Rows of an operation."""
    length: int = 2048
    """Tokens a row of an operation."""
    heads: int = 4
    """Heads of an operation."""
    width: int = 64
    """Features of a head's keys and values."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs of operations; decays, steps and states are float32."""
    model_batch: int = 4
    """Rows of a model."""
    model_length: int = 512
    """Tokens a row of a model."""
    tokens: int = 128
    """Tokens that are decoded."""
    repeats: int = 5
    """Timed runs of each; the median is reported."""
    implementations: tuple[str, ...] = ()
    """Further rows by these implementations, besides the one that dispatch chooses: xla, ..."""
    peers: tuple[str, ...] = tuple(peers.INSTALL)
    """Further rows by other libraries; what is missing is a row that says so."""
    plain: bool = True
    """Whether the plain one runs: it takes the most memory, and on an accelerator the most time."""
    one_core: bool = True
    """Whether all keeps to one core of the CPU."""
    compare: Path | None = None
    """An earlier benchmark.json; the figures are also said as parts of what they were."""
    out: Path = Path("runs/benchmark")
    """Folder for benchmark.json, benchmark.md and plots."""


def main(args: list[str] | None = None) -> int:
    """0: done, whatever peer or implementation does not run here. 2: something given is wrong. 1:
    stopped; what was measured by then is written."""
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(Benchmark, None, args, "benchmark", __doc__ or "")
        check(config)
        config = completed(config)
        old = earlier(config)
        with timing.one_core() if config.one_core else contextlib.nullcontext():
            mesh.found()  # or says why there are no devices
            report(config, old)
    except (ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark: stopped; what is in the tables above is also in --out", file=sys.stderr)
        return 1
    return 0


def completed(config: Benchmark) -> Benchmark:
    """With what a flag alone stands for, or all where none is given."""
    every = {
        "ops": tuple(problems(1, 1, 1, 1, config.dtype)),
        "models": whole_models.NAMES,
        "decode": (1, 8),
        "lengths": LENGTHS,
        "startup": DEPTHS,
    }
    none = all(getattr(config, name) is None for name in every)
    full = {name: all_ for name, all_ in every.items() if none or getattr(config, name) == ()}
    return dataclasses.replace(config, **full)


def check(config: Benchmark) -> None:
    """Raise a ValueError that names the first flag that cannot be."""
    allowed = {
        "ops": problems(1, 1, 1, 1, config.dtype),
        "models": whole_models.NAMES,
        "implementations": dict.fromkeys(
            name for op in KERNELS for name in sys.modules[op.__module__].IMPLEMENTATIONS
        ),
        "peers": peers.INSTALL,
    }
    for flag, known in allowed.items():
        for name in getattr(config, flag) or ():
            if name not in known:
                raise ValueError(f"--{flag} {name}: not one of {', '.join(known)}")
    long = config.lengths or ()
    for op in config.ops or () if long else ():
        if op not in lengths.OPS:
            raise ValueError(f"--lengths with --ops {op}: it is of {', '.join(lengths.OPS)}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} {number} must be at least 1")
    for length in long:
        if max(long) % length:
            raise ValueError(f"--lengths {length} does not divide {max(long)}, the longest")
    if config.compare and config.compare.resolve() == (config.out / FILE).resolve():
        raise ValueError(f"--compare {config.compare} would be replaced: name another --out")
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out} is not a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the package matplotlib is missing: pip install 'scanax[bench]'") from None


def earlier(config: Benchmark) -> dict[str, Any]:
    """The table to compare with; {} if none is asked for."""
    if config.compare is None:
        return {}
    try:
        old = json.loads(config.compare.read_text("utf-8"))
    except IsADirectoryError:
        raise ValueError(f"--compare {config.compare} is a folder, no benchmark.json") from None
    except ValueError as error:
        raise ValueError(f"--compare {config.compare}: {error}") from None
    known = {"sizes": dict, "machine": str, "date": str}
    ours = isinstance(old, dict) and all(isinstance(old.get(k), kind) for k, kind in known.items())
    if not ours or not all(isinstance(old.get(section, {}), dict) for section in TITLES):
        raise ValueError(f"--compare {config.compare} is not a benchmark.json")
    for name, value in sizes(config).items():
        if old["sizes"].get(name) != value:
            raise ValueError(
                f"--compare {config.compare} is of {name}={old['sizes'].get(name)}, this of {value}"
            )
    return old


def sizes(config: Benchmark) -> dict[str, Any]:
    """What has to be equal for figures of one name to be of one thing."""
    names = "batch", "length", "heads", "width", "dtype", "model_batch", "model_length", "tokens"
    return {name: getattr(config, name) for name in names}


def report(config: Benchmark, old: dict[str, Any]) -> None:
    """Print the tables, and write them and their plots after each operation or model."""
    device, whose = bounds.here()
    about = {
        "machine": timing.machine(timing.cores() if config.one_core else timing.available()),
        "memory": "large pages" if starting.large() else "small pages",
        "date": str(datetime.date.today()),
        "bounds": f"{device.memory:.3g} bytes and {device.flops:.3g} operations a second ({whose})",
        "sizes": sizes(config),
    }
    found: dict[str, Rows] = {}
    print("\n".join(introduction(about)), flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    for section, rows in measured(config, device):
        print("\n".join(["", *markdown(rows)]), flush=True)
        found[section] = found.get(section, {}) | rows
        files.write(config.out / FILE, json.dumps(about | found, indent=1))
        files.write(config.out / "benchmark.md", "\n".join(text(about, found, old)))
        pictures.draw(config.out, section, found[section], about["machine"])
    print(
        "\n".join(["", *compared(found, old), f"{config.out}: benchmark.json, benchmark.md, plots"])
    )


def measured(config: Benchmark, device: bounds.Device) -> Iterator[tuple[str, Rows]]:
    """(section, rows) of an operation or a model after the other."""
    shape, dtype = (config.heads, config.width), jnp.dtype(config.dtype)

    def rounds(what):
        bar = tqdm.tqdm(total=config.repeats, desc=what, leave=False, disable=None)
        with bar:
            yield from timing.rounds(config.repeats, bar)

    made = problems(config.batch, config.length, *shape, dtype)
    for op in config.ops or ():
        more = config.implementations, config.peers, config.plain
        yield "ops", operations.measure(op, made[op](), device, rounds(op), *more)
    for name in config.models or ():
        size = config.model_batch, config.model_length
        call = functools.partial(models.train, name, *size, rounds(name), config.peers)
        yield "models", fitting(name, call)
    for rows in config.decode or ():
        for name in config.models or whole_models.NAMES:
            what = f"{name}, {rows} rows"
            size = rows, config.tokens
            call = functools.partial(models.decode, name, *size, rounds(what), config.peers)
            yield "decode", fitting(f"{name} B={rows}", call)
    tokens = config.lengths or ()
    for op in [op for op in config.ops or lengths.OPS if op in lengths.OPS] if tokens else ():
        call = functools.partial(lengths.measure, op, tokens, *shape, dtype, rounds(op))
        yield "lengths", fitting(op, call)
    if config.startup:
        yield "startup", startup.measure(config.startup, rounds("start-up"))


def fitting(name: str, call: Callable[[], Rows]) -> Rows:
    """The rows, or one that says why there are none: they do not fit this device, say."""
    try:
        return call()
    except jax.errors.JaxRuntimeError as error:
        return {name: {"note": f"none: {str(error).splitlines()[0]}"}}


def introduction(about: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {value}" for name, value in about["sizes"].items())
    where = f"{about['machine']}, {about['memory']}, {about['date']}"
    return [f"{where}; {sizes}.", f"Bounds of operations: {about['bounds']}."]


def text(about: dict[str, Any], found: dict[str, Rows], old: dict[str, Any]) -> list[str]:
    """The tables of all sections, and of what changed."""
    lines = introduction(about)
    for section, rows in found.items():
        lines += ["", f"## {TITLES[section]}", "", *markdown(rows)]
    return [*lines, *compared(found, old), ""]


def compared(found: dict[str, Rows], old: dict[str, Any]) -> list[str]:
    """Times and memory of rows that both have, as parts of what they were."""
    lines = []
    for section, rows in found.items() if old else ():
        rows = changes(rows, old.get(section, {}))
        title = f"## {TITLES[section]}: as parts of what {old['date']} had on {old['machine']}"
        lines += ["", title, "", *markdown(rows)] if rows else []
    return lines


if __name__ == "__main__":
    sys.exit(main())
