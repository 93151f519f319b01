"""Models that a measurement needs: trained, and evaluated, once for each seed and never twice."""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from . import config, flags, metrics, processes
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


def task_of(given: Iterable[str]) -> Any:
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
    for (_, run), figures in zip(runs, finals, strict=True):
        for metric, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{run.folder}: {metric} is {value}: nothing to compare")
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
    there = dataclasses.replace(
        config.read(path), run=wanted.run, resume=False, step=None, hosts=Hosts()
    )
    if changes := config.differences(wanted, there):
        raise ValueError(f"{run.folder} holds another run: {changes[0]}; move it or remove it")
    if (run.folder / "final.json").exists():
        return None
    return Job(name, "train", ("--resume", "--run", str(run.folder)), log)


def final(run: Run) -> dict[str, Any]:
    path = run.folder / "final.json"
    if not path.exists():
        raise ValueError(f"{run.folder} was stopped; the same command goes on with it")
    return read(path)


class Kept(dict):
    """An object of a file of JSON; ValueError names what it lacks, and the file."""

    def __init__(self, path: Path, content: dict[str, Any]):
        super().__init__(content)
        self.path = path

    def __missing__(self, key: Any) -> Any:
        raise ValueError(f"{self.path} lacks {key!r}: it is of another version; measure it anew")


def read(path: Path) -> Kept:
    """A file of JSON; ValueError that names it if it is none."""
    try:
        return json.loads(path.read_text("utf-8"), object_hook=functools.partial(Kept, path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; remove it") from None


def all_evaluated(folders: Sequence[Path], at_once: int = 1) -> list[dict[str, Any]]:
    """What `evaluate` writes of each run, whose pictures it leaves in the run's folder.

    Kept until the run goes on or the file of its task changes; after another change of what is
    measured, remove the `evaluated.json` of the runs.
    """
    jobs, made = [], {}
    for folder in folders:
        file = folder / "evaluated.json"
        about = {"task": digest(folder)}
        since = (folder / "final.json").stat().st_mtime_ns
        fresh = file.exists() and file.stat().st_mtime_ns >= since
        if fresh and about.items() <= read(file).items():
            continue
        (folder / "evaluation.json").unlink(missing_ok=True)  # which `evaluate` would add to
        name = f"{folder.parent.name}/{folder.name}"
        given = ("--checkpoint", str(folder))
        jobs.append(Job(name, "evaluate", given, Path(f"{folder}.log")))
        made[name] = file, about

    def ended(job: Job) -> None:
        file, about = made[job.name]
        found = read(file.with_name("evaluation.json"))
        new = file.with_name("evaluated.json.new")
        new.write_text(json.dumps(about | {"found": found}), "utf-8")
        os.replace(new, file)

    processes.run(jobs, at_once, ended)
    kept = (folder / "evaluated.json" for folder in folders)
    return [read(file)["found"] for file in kept]


def digest(folder: Path) -> str:
    """Of the file that has the task of a run."""
    kind = type(config.read(folder / "config.json").task)
    return file_digest(Path(inspect.getfile(kind)))


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


def by(found: dict[str, Any], over: str) -> list[tuple[float, float]]:
    """(x, % right) of a curve that `evaluate` finds of a run."""
    return [(float(point[over]), 100 * point["accuracy"]) for point in found[f"by_{over}"]]


def averaged(curves: Iterable[Iterable[Sequence[float]]]) -> list[list[float]]:
    """(x, mean of y, its spread or 0) of curves of (x, y), one a seed, over the same x."""
    points, curves = [], [list(curve) for curve in curves]
    for curve in curves:
        if [x for x, *_ in curve] != [x for x, *_ in curves[0]]:
            raise ValueError("the runs of the seeds were not measured at the same places")
    for each in zip(*curves, strict=True):
        mean, spread = mean_and_spread(float(y) for _, y in each)
        points.append([float(each[0][0]), mean, spread or 0.0])
    return points


def mean_and_spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation (of n - 1) where there are two values or more."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def shown(mean: float, spread: float | None, digits: int) -> str:
    """`98.4 ± 0.3`, or without a spread `98.4`."""
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def quickest(ended: Iterable[Ended]) -> float:
    """Seconds of the run that the machine held up least."""
    return min(each.final["seconds"] for each in ended)
