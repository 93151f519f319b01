"""Command lines from dataclasses: presets, further flags, and one line for what is wrong."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import re
from pathlib import Path
from typing import Any

import tyro

from ..models.presets import PRESETS, VIDEO_PRESETS, VISION_PRESETS
from ..models.pretrained.compare import difference
from .config import TrainConfig, read, task_name
from .datasets.text import are_arrays
from .launcher import Hosts
from .loading import Found, find
from .tasks.lm import LMTask

ENDS = ("steps", "minutes")
SIZES = PRESETS | VISION_PRESETS | VIDEO_PRESETS
COMPUTED = ("dtype", "param_dtype", "unroll", "remat", "loss_chunk", "vocab_multiple")


def train(args: list[str]) -> TrainConfig:
    """The config that these flags name: a preset's, or with --resume the run's own, and changes."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default="stdlib")
    first.add_argument("--run", default="")
    first.add_argument("--from", dest="source", default="")
    first.add_argument("--resume", action="store_true")
    for name in ENDS:
        first.add_argument(f"--{name}", default=argparse.SUPPRESS)
    try:
        early, _ = first.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    run = Path(early.run) if early.run else folder(early.preset, early.resume)
    if early.resume and early.source:
        raise ValueError(f"--from {early.source} begins a new run, --resume goes on with one")
    if early.resume:
        config = dataclasses.replace(read(run / "config.json"), step=None, hosts=Hosts())
    else:
        config = dataclasses.replace(preset(early.preset), preset=early.preset)
    found = find(early.source) if early.source else None
    if found is not None:
        config = dataclasses.replace(config, task=of(found, config.task))
    config = dataclasses.replace(config, run=str(run))
    if any(name in early for name in ENDS):  # an end that is given stands alone
        config = dataclasses.replace(config, **dict.fromkeys(ENDS))
    about = "Train a task. --preset chooses what all other flags start from: "
    about += f"{', '.join(files())} (experiments/configs), {', '.join(SIZES)} (model sizes)."
    made = parse(TrainConfig[type(config.task)], config, args, "train", about)
    if early.resume and made.preset != config.preset:
        raise ValueError(
            f"preset={made.preset!r}, but {run} is of {config.preset!r}; a resumed run keeps its "
            "preset, and other flags change it"
        )
    if found is not None:
        check(found, made)
    return made


def of(found: Found, task: Any) -> Any:
    """A task with the model, and the tokens if there are, of what was found."""
    if type(found.config.task) is not type(task):
        ours, theirs = task_name(task), task_name(found.config.task)
        raise ValueError(f"--from: {found.folder} is of the task {theirs}, the preset of {ours}")
    if not isinstance(task, LMTask):
        return dataclasses.replace(task, model=found.config.task.model)
    model, theirs = found.config.task.model, found.config.task.data
    if found.step is None:  # published: how it is computed is said here
        how = {name: getattr(task.model, name) for name in COMPUTED}
        model = dataclasses.replace(model, **how)
    data = dataclasses.replace(task.data, tokenizer=theirs.tokenizer)
    return dataclasses.replace(task, model=model, data=data)


def check(found: Found, made: TrainConfig) -> None:
    """ValueError if the flags make another model, or nothing says what its tokens are."""
    if changed := difference(made.task.model, found.config.task.model):
        raise ValueError(f"--from {made.source} holds another model: {changed}")
    if not isinstance(made.task, LMTask):
        return
    data = made.task.data
    if found.step is None and data.tokenizer is None and not are_arrays(data.paths, data.suffixes):
        raise ValueError(
            f"{made.source} has no tokenizer.json; name one with --data.tokenizer (bytes, if its "
            "tokens are bytes)"
        )


def folder(preset: str, resume: bool) -> Path:
    """Of runs/PRESET, runs/PRESET-2, ...: the last one there is to resume, else the next."""
    last, number = None, 1
    while (path := Path(f"runs/{preset}-{number}" if number > 1 else f"runs/{preset}")).exists():
        if untouched(path):
            break
        last, number = path, number + 1
    return last if resume and last is not None else path


def untouched(folder: Path) -> bool:
    """Whether this is an empty folder, or one whose run ended before it wrote its config."""
    early = {"config.json.new", "wandb_id", "wandb"}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= early


def files() -> list[str]:
    """Names of the experiments of experiments/configs."""
    folder = Path(__file__).parent / "configs"
    return sorted(p.stem.replace("_", "-") for p in folder.glob("*.py") if p.stem != "__init__")


def language_model(name: str) -> TrainConfig[LMTask]:
    """A preset whose task is a language model. ValueError for another's."""
    config = preset(name)
    if not isinstance(config.task, LMTask):
        raise ValueError(
            f"preset {name} is of the task {task_name(config.task)}, and this is of language models"
        )
    return config


def preset(name: str) -> TrainConfig:
    """An experiment of experiments/configs, or the default one with a model of published size."""
    if name in files():
        module = importlib.import_module(f".configs.{name.replace('-', '_')}", __package__)
        return module.config
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, 3, 0)
        raise ValueError(
            f"preset {name!r} is not one of {', '.join(files())}, nor a size, as {', '.join(near)} "
            "(train --help lists all)"
        )
    of_kind = {"vision-digits": VISION_PRESETS, "video-bouncing": VIDEO_PRESETS}
    config = preset(next((base for base, sizes in of_kind.items() if name in sizes), "stdlib"))
    return dataclasses.replace(config, task=dataclasses.replace(config.task, model=SIZES[name]))


def parse(kind: Any, default: Any, args: list[str], program: str, description: str) -> Any:
    """Flags for the fields of a dataclass; ValueError of one line for a wrong one."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, default=default, args=args, prog=program, description=description)
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # tyro draws a box, or where the terminal is not UTF-8 rows of dashes: a title, what is wrong, a
    # line, hints
    text = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
    _, *lines = (line.strip(" │╭╮╰╯─") for line in text.strip().splitlines())
    rows = itertools.dropwhile(lambda line: not line.strip("-"), lines)
    message = " ".join(itertools.takewhile(lambda line: line.strip("-"), rows))
    # a dataclass that refuses its values says itself which
    message = re.sub(r"^Error parsing (?!--)\S+ ", "", message)
    raise ValueError(f"{message} (--help lists all flags)")
