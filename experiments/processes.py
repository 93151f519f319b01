"""Programs of this folder in processes of their own, each on one core, some at a time."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import timing


class Job(NamedTuple):
    """`python -m scanax.experiments.MODULE ARGUMENTS`, under a name; what it says goes to a log."""

    name: str
    module: str
    arguments: tuple[str, ...]
    log: Path


def run(
    jobs: Sequence[Job], at_once: int = 1, ended: Callable[[Job], object] = lambda job: None
) -> None:
    """Run all, and say on stderr which began and how much is left; `ended` is told each success.

    ValueError with the last line of the log of the first that fails. Whatever ends this ends the
    others by SIGTERM first, at which a training run saves and stops.
    """
    waiting, running, begun = list(enumerate(jobs)), {}, time.monotonic()
    try:
        while waiting or running:
            for core in range(at_once):
                if waiting and core not in running:
                    number, job = waiting.pop(0)
                    running[core] = job, start(job, core)
                    say(job, number - len(running) + 1, len(jobs), time.monotonic() - begun)
            time.sleep(0.1)
            for core, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[core]
                    check(job, process.returncode)
                    ended(job)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def start(job: Job, core: int) -> subprocess.Popen:
    """The process, on the core of this number among those that we may use."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"scanax.experiments.{job.module}", *job.arguments]
    with job.log.open("ab") as log, timing.one_core(core):
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def say(job: Job, done: int, count: int, seconds: float) -> None:
    left = f", about {seconds / done * (count - done) / 60:.0f} min left" if done > 0 else ""
    print(f"{done} of {count} done{left}; now {job.name} ({job.log})", file=sys.stderr, flush=True)


def check(job: Job, code: int) -> None:
    if code:
        lines = job.log.read_text("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise ValueError(f"{job.name} ended with status {code}: {last} (all of it: {job.log})")
