"""Which sizes of chunks and tiles are fastest here: times them, and keeps the choice for kernels.

python -m scanax.experiments.tune
python -m scanax.experiments.tune --ops linear_attention --widths 128 --dtypes bfloat16
SCANAX_TILES=tiles.json python -m scanax.experiments.tune

Each implementation that runs on this device is timed forward and backward (decode, one query
against `length` keys: forward) with every size that it takes, by turns. The default stays unless
another is at least 3 % faster: less may be noise. The table is $SCANAX_TILES, or
scanax/tiles.json in the user's cache; programs that begin afterwards use it.
"""

import os
import sys

from scanax.experiments import starting

starting.begin(__name__)

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from scanax.experiments import flags, timing
from scanax.kernels import attention, fixed_query, linear_attention, selective_scan, tuned
from scanax.sharding import mesh

NAMES = ("pallas_gpu", "pallas_tpu", "xla")
CHUNKS = (8, 16, 32, 64, 128, 256)
BLOCKS = (64, 128, 256, 512, 1024)
STATES = 16  # of a channel of the selective scan
NOISE = 0.03


@dataclasses.dataclass(frozen=True)
class Tune:
    """Time the sizes of chunks and tiles on this device, and keep the fastest."""

    ops: tuple[str, ...] = (
        "linear_attention",
        "selective_scan",
        "attention",
        "decode",
        "fixed_query",
    )
    """Which operations."""
    widths: tuple[int, ...] = (64, 128)
    """Features of a head's keys and values; the selective scan has 16 states at every width."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the inputs."""
    batch: int = 2
    """Rows."""
    heads: int = 4
    """Heads, all with keys of their own; what decoding looks up depends on it, and the selective
    scan has 2 heads x width channels."""
    length: int = 2048
    """Tokens a row; no entry depends on it."""
    repeats: int = 5
    """Timed runs of each; the median counts."""
    out: Path | None = None
    """The table to write to (none: the one that kernels read)."""


class Case(NamedTuple):
    """One call to tune: `run` takes the arguments, an implementation's name, and a size or None."""

    op: str
    public: Callable
    run: Callable
    arguments: tuple
    sizes: tuple[int, ...]


def linear_cases(config: Tune, width: int, dtype: Any) -> Iterator[Case]:
    """One with a decay for every feature of the keys, and one with a decay for every head."""
    normal = drawn(dtype)
    shape = config.batch, config.length, config.heads
    q, k, v = (normal(*shape, width) for _ in range(3))

    def run(q, k, v, log, name, size):
        return linear_attention(q, k, v, log, implementation=name, chunk=size)

    for decays in ((*shape, width), shape):
        log = jax.nn.log_sigmoid(normal(*decays).astype(jnp.float32))
        yield Case("linear_attention", linear_attention, run, (q, k, v, log), CHUNKS)


def selective_cases(config: Tune, width: int, dtype: Any) -> Iterator[Case]:
    """The sizes go by the number of states: one width tells all there is to know."""
    normal, rows = drawn(dtype), (config.batch, config.length)
    channels = 2 * config.heads * width
    delta = jax.nn.softplus(normal(*rows, channels).astype(jnp.float32) - 4)
    A = -jnp.broadcast_to(jnp.arange(1.0, STATES + 1, dtype=jnp.float32), (channels, STATES))

    def run(u, delta, A, B, C, name, size):
        return selective_scan(u, delta, A, B, C, implementation=name, chunk=size)

    arguments = normal(*rows, channels), delta, A, normal(*rows, STATES), normal(*rows, STATES)
    yield Case("selective_scan", selective_scan, run, arguments, CHUNKS)


def attention_cases(config: Tune, width: int, dtype: Any) -> Iterator[Case]:
    """Causal, each query over the keys before it."""
    normal = drawn(dtype)
    qkv = (normal(config.batch, config.length, config.heads, width) for _ in range(3))

    def run(q, k, v, name, size):
        return attention(q, k, v, implementation=name, block=size)

    yield Case("attention", attention, run, (*qkv,), BLOCKS)


def decode_cases(config: Tune, width: int, dtype: Any) -> Iterator[Case]:
    """One query a row over a full cache."""
    normal = drawn(dtype)
    q = normal(config.batch, 1, config.heads, width)
    k, v = (normal(config.batch, config.heads, config.length, width) for _ in range(2))
    last = jnp.full((config.batch, 1), config.length - 1, jnp.int32)

    def run(q, k, v, name, size):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # of a cache, which is read as it lies
        return attention(q, k, v, q_index=last, implementation=name, block=size)

    yield Case("decode", attention, run, (q, k, v), BLOCKS)


def fixed_cases(config: Tune, width: int, dtype: Any) -> Iterator[Case]:
    """Aaren's scan."""
    normal = drawn(dtype)
    k, v = (normal(config.batch, config.length, config.heads, width) for _ in range(2))

    def run(q, k, v, name, size):
        return fixed_query(q, k, v, implementation=name, chunk=size)

    yield Case("fixed_query", fixed_query, run, (normal(config.heads, width), k, v), CHUNKS)


def drawn(dtype: Any) -> Callable[..., jax.Array]:
    """What makes normal numbers of a shape."""
    rng = np.random.default_rng(0)
    return lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)


OPS = {
    "linear_attention": linear_cases,
    "selective_scan": selective_cases,
    "attention": attention_cases,
    "decode": decode_cases,
    "fixed_query": fixed_cases,
}


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong, or the table is."""
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(Tune, None, args, "tune", __doc__ or "")
        check(config)
        tune(config, (config.out or tuned.path()).absolute())
    except (ValueError, OSError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    return 0


def check(config: Tune) -> None:
    """Raise a ValueError that names the first flag that cannot be."""
    for flag, known in (("ops", OPS), ("dtypes", ("float32", "bfloat16"))):
        for name in getattr(config, flag):
            if name not in known:
                raise ValueError(f"--{flag} {name}: not one of {', '.join(known)}")
    for name in ("batch", "heads", "length", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least 1")
    if config.out is not None and config.out.is_dir():
        raise ValueError(f"--out {config.out} is a folder; name a file, as tiles.json")
    for width in config.widths:
        if width < 1:
            raise ValueError(f"--widths {width} must be at least 1")


def tune(config: Tune, file: Path) -> None:
    """Print a line of each call, and write each choice as soon as it is made."""
    mesh.found()
    read(file)  # one that is damaged is said now
    file.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, B={config.batch} "
        f"T={config.length} H={config.heads}; milliseconds by size",
        flush=True,
    )
    said: set[str] = set()
    written: set[str] = set()
    wanted = itertools.product(config.ops, config.dtypes, config.widths)
    cases = (
        case for op, dtype, width in wanted for case in OPS[op](config, width, jnp.dtype(dtype))
    )
    for case in cases:
        for name in NAMES:
            if name not in sys.modules[case.public.__module__].IMPLEMENTATIONS:
                continue
            for line in row(case, name, config, file, written):
                if line not in said:
                    print(line, flush=True)
                said.add(line)
    print(f"written to {file}" if written else "nothing was written")
    if written and file != tuned.path().absolute():
        print(f"kernels read it where SCANAX_TILES={file}")


def row(case: Case, name: str, config: Tune, file: Path, written: set[str]) -> Iterator[str]:
    """Tune one call of one implementation; what to print of it."""
    where = f"{case.op} {name}"
    with tuned.record() as asked:
        try:
            jax.eval_shape(program(case, name, None), *case.arguments)
        except NotImplementedError as error:
            yield f"{where}: {reason(error)}"
            return
    own = {key: default for key, default in asked.items() if key.startswith(f"{case.op} |")}
    if len(own) != 1:
        yield f"{where}: passed over, since it looks up {len(own) or 'no'} sizes of its own"
        return
    ((key, default),) = own.items()
    if key in written:
        return
    sizes = sorted({default, *(size for size in case.sizes if size <= config.length)})
    calls, refused = {}, []
    with tqdm.tqdm(total=len(sizes) + config.repeats, desc=key, leave=False, disable=None) as bar:
        for size in sizes:
            try:
                calls[size] = prepared(case, name, size)
            except Exception as error:  # the implementation's or a compiler's, of any kind
                refused.append(f"{key}: {size} is passed over: {reason(error)}")
            bar.update()
        times = timing.medians(calls, timing.rounds(config.repeats, bar))
    yield from refused
    if not times:
        yield f"{key}: it takes none of {', '.join(map(str, sizes))}"
        return
    best = choice(times, default)
    write(file, key, best)
    written.add(key)
    figures = ", ".join(f"{size}: {ms:.4g}" for size, ms in times.items())
    yield f"{key} | {figures} | default {default}, chosen {best}"


def choice(times: dict[int, float], default: int) -> int:
    """The fastest size, but the default if that is hardly slower."""
    best = min(times, key=lambda size: times[size])
    return default if times.get(default, math.inf) * (1 - NOISE) < times[best] else best


def program(case: Case, name: str, size: int | None) -> Callable:
    """What is timed."""

    def run(*arguments):
        return case.run(*arguments, name, size)

    return run if case.op == "decode" else timing.both(run)


def prepared(case: Case, name: str, size: int) -> Callable[[], float]:
    """What times a call of this size; the call has run once."""
    call = timing.compiled(program(case, name, size), case.arguments)
    call = functools.partial(call, *case.arguments)
    jax.block_until_ready(call())
    return functools.partial(timing.seconds, call)


def reason(error: Exception) -> str:
    """Why a call is refused, in a line: of dispatch's sentence what follows the name."""
    (text, *_) = str(error).strip().splitlines() or [""]
    if isinstance(error, NotImplementedError):
        return text.partition("takes this call: ")[2].partition(": ")[2] or text
    return f"{type(error).__name__}: {text}"


def read(file: Path) -> dict[str, int]:
    """The entries of a table as they are now. ValueError for what is none."""
    tuned.table.cache_clear()
    return tuned.table(file)


def write(file: Path, key: str, size: int) -> None:
    """Set one entry; the file is at every moment whole, and others may write theirs meanwhile."""
    import fcntl  # not on Windows, where no kernel is tuned

    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        entries = dict(sorted({**read(file), key: size}.items()))
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(entries, indent=1))
        os.replace(new, file)
    finally:
        os.close(folder)
    tuned.table.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
