"""Start-up: a `train` command, from its beginning to its first step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from .. import starting, timing
from .table import Row, Rows

TRAIN = "scanax.experiments.train"
PAUSE, LIMIT = 0.02, 1800  # seconds between two looks at the log, and of them all


def measure(depths: Sequence[int], rounds: Iterable[int]) -> Rows:
    """A row for each depth: seconds until the log has the first step, with an empty cache of
    compiled programs and with what that left in it, and of importing alone. All take turns.

    A step is logged while the next is computed. On an accelerator, which this program holds and
    `train` would need, a row says that there is nothing.
    """
    if jax.default_backend() != "cpu":
        note = "none: the benchmark holds the accelerator that `train` would need"
        return {f"train, depth {depth}": {"note": note} for depth in depths}
    spent: dict[int, dict[str, list[float]]] = {
        depth: {"cold_s": [], "warm_s": [], "imports_s": []} for depth in depths
    }
    for _ in rounds:
        for depth, times in spent.items():
            with tempfile.TemporaryDirectory() as folder:
                environment = surroundings(f"{folder}/cache")
                for name in ("cold_s", "warm_s"):
                    times[name].append(_first_step(depth, Path(folder, name), environment))
                times["imports_s"].append(_imported(environment))
    return {f"train, depth {depth}": _row(times) for depth, times in spent.items()}


def surroundings(cache: str) -> dict[str, str]:
    """The environment of a command that a user types, where compiled programs are kept in `cache`;
    of what JAX may be told of its cache, and what this command told itself, nothing is left."""
    return {
        name: value
        for name, value in starting.before(os.environ).items()
        if "COMPILATION_CACHE" not in name and "PERSISTENT_CACHE" not in name
    } | {"JAX_COMPILATION_CACHE_DIR": cache}


def _row(times: dict[str, list[float]]) -> Row:
    row: Row = {}
    for name, each in times.items():
        row |= {name: statistics.median(each), f"{name}_spread": timing.spread(each)}
    return row


def _imported(environment: dict[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {TRAIN}"], env=environment, check=True)
    return time.perf_counter() - begun


def _first_step(depth: int, run: Path, environment: dict[str, str]) -> float:
    flags = ["--steps", "2", "--log-every", "1", "--model.depth", str(depth), "--run", str(run)]
    log, errors = run / "metrics.jsonl", run.with_suffix(".txt")
    begun = time.perf_counter()
    with errors.open("w", encoding="utf-8") as said:
        command = [sys.executable, "-m", TRAIN, *flags]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            while not (log.exists() and log.stat().st_size):
                if time.perf_counter() - begun > LIMIT:
                    raise ValueError(f"{' '.join(command)}: no step within {LIMIT} s")
                if process.poll() is not None:
                    last = errors.read_text("utf-8", "replace").strip().splitlines() or [""]
                    raise ValueError(f"{' '.join(command)} ended before its first step: {last[-1]}")
                time.sleep(PAUSE)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()
