"""Models that a measurement needs: trained, and evaluated, once for each seed and never twice."""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from . import flags, metrics, processes
from .config import differences, from_json
from .launcher import Hosts
from .processes import Job

QUIET = ("--save-every", "0", "--keep", "1", "--no-plot", "--no-tensorboard")


class Run(NamedTuple):
    """What a run of `train` is given, besides what every run here is (QUIET), and its folder."""

    flags: tuple[str, ...]
    seed: int
    folder: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        return *QUIET, *self.flags, "--seed", str(self.seed), "--run", str(self.folder)


class Ended(NamedTuple):
    """A run at its end."""

    run: Run
    final: dict[str, Any]
    """Its final.json: step, seconds, parameters and held-out metrics."""
    found: dict[str, Any]
    """What `evaluate` found of it; empty where that was not asked for."""


def task(given: Iterable[str]) -> Any:
    """The task that flags of `train` make; ValueError for wrong ones."""
    return flags.train(["--run", "runs", *given]).task


def each_seed(
    models: Mapping[str, Iterable[str]],
    seeds: Iterable[int],
    folder: Path,
    at_once: int = 1,
    evaluate: bool = True,
) -> dict[str, list[Ended]]:
    """Models, by name the flags of `train` that make them: how each ended with each of the seeds.

    A run is kept in the folder, under its model's name and its seed.
    """
    runs = [
        (name, Run(tuple(given), seed, folder / f"{file_name(name)}-{seed}"))
        for seed in seeds
        for name, given in models.items()
    ]
    finals = all_trained([run for _, run in runs], at_once)
    found = [{} for _ in runs]
    if evaluate:
        found = all_evaluated([run.folder for _, run in runs], at_once=at_once)
    ended: dict[str, list[Ended]] = {name: [] for name in models}
    for (name, run), *rest in zip(runs, finals, found, strict=True):
        ended[name].append(Ended(run, *rest))
    return ended


def file_name(name: str) -> str:
    """Of a model's: its words."""
    return "-".join(re.findall("[a-z0-9]+", name.lower()))


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


def all_evaluated(
    folders: Sequence[Path], flags: Sequence[str] = (), at_once: int = 1
) -> list[dict[str, Any]]:
    """What `evaluate` with these flags writes of each run.

    Kept until the run goes on, or the file of its task, which says what is measured, changes.
    """
    jobs, made = [], {}
    for folder in folders:
        file = folder / "evaluated.json"
        about = {"flags": list(flags), "task": digest(folder)}
        since = (folder / "final.json").stat().st_mtime_ns
        fresh = file.exists() and file.stat().st_mtime_ns >= since
        if fresh and about.items() <= json.loads(file.read_text("utf-8")).items():
            continue
        arguments = ("--checkpoint", str(folder), "--no-plot", *flags)
        name = f"{folder.parent.name}/{folder.name}"
        jobs.append(Job(name, "evaluate", arguments, Path(f"{folder}.log")))
        made[name] = file, about

    def ended(job: Job) -> None:
        file, about = made[job.name]
        found = json.loads(file.with_name("evaluation.json").read_text("utf-8"))
        new = file.with_name("evaluated.json.new")
        new.write_text(json.dumps(about | {"found": found}), "utf-8")
        os.replace(new, file)

    processes.run(jobs, at_once, ended)
    kept = (folder / "evaluated.json" for folder in folders)
    return [json.loads(file.read_text("utf-8"))["found"] for file in kept]


def digest(folder: Path) -> str:
    """Of the file that has the task of a run."""
    config = from_json(json.loads((folder / "config.json").read_text("utf-8")))
    return file_digest(Path(inspect.getfile(type(config.task))))


@functools.cache
def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parameters(task: Any) -> int:
    """How many numbers a task's model learns."""
    shapes = nnx.eval_shape(lambda: task.build(nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def heldout(folder: Path, name: str) -> list[tuple[float, float]]:
    """(step, a held-out metric) of each validation of a run."""
    rows, name = metrics.read(folder), f"heldout_{name}"
    return [(float(row["step"]), row[name]) for row in rows if row.get(name) is not None]


def averaged(curves: Iterable[Iterable[Sequence[float]]]) -> list[list[float]]:
    """(x, mean of y, its spread or 0) of curves of (x, y), one a seed, over the same x."""
    points = []
    for each in zip(*curves, strict=True):
        mean, spread = mean_and_spread(float(y) for _, y in each)
        points.append([float(each[0][0]), mean, spread or 0.0])
    return points


def mean_and_spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (of n - 1) where there are two values or more."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
