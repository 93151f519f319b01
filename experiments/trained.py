"""Models that a measurement needs: trained, and evaluated, once for each seed and never twice."""

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import flags, processes
from .config import differences, from_json
from .launcher import Hosts
from .processes import Job


class Run(NamedTuple):
    """What a run of `train` is given, and its folder."""

    preset: str
    flags: tuple[str, ...]
    seed: int
    folder: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        given = "--preset", self.preset, "--seed", str(self.seed), "--run", str(self.folder)
        return *given, *self.flags


def trained(preset: str, flags: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """One run; see `all_trained`."""
    return all_trained([Run(preset, tuple(flags), seed, folder)])[0]


def all_trained(runs: Sequence[Run], at_once: int = 1) -> list[dict[str, Any]]:
    """What is in each run's final.json: step, seconds, parameters, and its held-out metrics.

    A run that is at its end is not trained again, one that was stopped goes on. ValueError for a
    folder that holds a run of other flags, and for flags that are wrong, before anything is
    trained.
    """
    jobs = [job for run in runs if (job := remaining(run)) is not None]
    processes.run(jobs, at_once)
    return [final(run) for run in runs]


def remaining(run: Run) -> Job | None:
    """What is left to do of a run."""
    wanted = dataclasses.replace(flags.train(list(run.arguments)), resume=False)
    name, log = f"{run.folder.parent.name}/{run.folder.name}", Path(f"{run.folder}.log")
    path = run.folder / "config.json"
    if not path.exists():
        return Job(name, "train", run.arguments, log)
    there = from_json(json.loads(path.read_text("utf-8")))
    there = dataclasses.replace(there, run=wanted.run, resume=False, step=None, hosts=Hosts())
    if changes := differences(wanted, there):
        raise ValueError(f"{run.folder} holds another run: {changes[0]}; move it or remove it")
    if (run.folder / "final.json").exists():
        return None
    return Job(name, "train", ("--resume", "--run", str(run.folder)), log)


def final(run: Run) -> dict[str, Any]:
    path = run.folder / "final.json"
    if not path.exists():
        raise ValueError(f"{run.folder} was stopped; the same command goes on with it")
    return json.loads(path.read_text("utf-8"))


def evaluated(folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """What is in the evaluation.json of a run; see `all_evaluated`."""
    return all_evaluated([folder], flags)[0]


def all_evaluated(
    folders: Sequence[Path], flags: Sequence[str] = (), at_once: int = 1
) -> list[dict[str, Any]]:
    """What `evaluate` with these flags writes of each run; kept until the run goes on."""
    kept = [folder / "evaluated.json" for folder in folders]
    jobs, made = [], []
    for folder, file in zip(folders, kept, strict=True):
        since = (folder / "final.json").stat().st_mtime_ns
        fresh = file.exists() and file.stat().st_mtime_ns >= since
        if fresh and json.loads(file.read_text("utf-8"))["flags"] == list(flags):
            continue
        arguments = ("--checkpoint", str(folder), "--no-plot", *flags)
        name = f"{folder.parent.name}/{folder.name}"
        jobs.append(Job(name, "evaluate", arguments, Path(f"{folder}.log")))
        made.append((folder, file))
    processes.run(jobs, at_once)
    for folder, file in made:
        found = json.loads((folder / "evaluation.json").read_text("utf-8"))
        new = file.with_name("evaluated.json.new")
        new.write_text(json.dumps({"flags": list(flags), "found": found}), "utf-8")
        os.replace(new, file)
    return [json.loads(file.read_text("utf-8"))["found"] for file in kept]


def mean_and_spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (of n - 1) where there are two values or more."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
