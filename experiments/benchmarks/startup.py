"""Start-up: a `train` command, from its beginning to its first step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import timing
from .table import Row, Rows

TRAIN = "scanax.experiments.train"
PAUSE = 0.02  # seconds between two looks at the log


def measure(depths: Sequence[int], rounds: Iterable[int]) -> Rows:
    """A row for each depth: seconds to the first step's row in the log, with an empty cache of
    compiled programs and with what that left in it, and of importing alone. All take turns."""
    spent: dict[int, dict[str, list[float]]] = {
        depth: {"cold_s": [], "warm_s": [], "imports_s": []} for depth in depths
    }
    for _ in rounds:
        for depth, times in spent.items():
            with tempfile.TemporaryDirectory() as folder:
                environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=f"{folder}/cache")
                environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
                for name in ("cold_s", "warm_s"):
                    times[name].append(_first_step(depth, Path(folder, name), environment))
                times["imports_s"].append(_imported(environment))
    return {f"train, depth {depth}": _row(times) for depth, times in spent.items()}


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
    flags = ["--steps", "2", "--model.depth", str(depth), "--run", str(run)]
    log, errors = run / "metrics.jsonl", run.with_suffix(".txt")
    begun = time.perf_counter()
    with errors.open("w", encoding="utf-8") as said:
        command = [sys.executable, "-m", TRAIN, *flags]
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    last = errors.read_text("utf-8").strip().splitlines() or [""]
                    raise ValueError(f"{' '.join(command)} ended before its first step: {last[-1]}")
                time.sleep(PAUSE)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()
