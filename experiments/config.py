"""What a training run is: a frozen dataclass, its flags, and config.json beside its weights."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from ..sharding.schedule import Schedule
from .launcher import Hosts
from .optimizer import OptimizerConfig
from .tasks.digits import DigitsTask
from .tasks.events import EventsTask
from .tasks.forecast import ForecastTask
from .tasks.lm import LMTask
from .tasks.recall import RecallTask
from .tasks.video import VideoTask
from .tasks.vision import VisionTask

TASKS = {
    "lm": LMTask,
    "recall": RecallTask,
    "forecast": ForecastTask,
    "events": EventsTask,
    "digits": DigitsTask,
    "vision": VisionTask,
    "video": VideoTask,
}
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Generic[T]):
    """Train a task."""

    task: Annotated[T, tyro.conf.arg(name="")]
    preset: str = "stdlib"
    """What the other flags change: a file of experiments/configs, or a model of published size."""
    source: Annotated[str, tyro.conf.arg(name="from", metavar="DIR")] = ""
    """Weights to begin with instead of random ones: a published checkpoint's directory or Hub id,
    or a run, of which the latest are taken. The model is theirs, and so are the tokens."""
    run: str = ""
    """Directory of the run: checkpoints, metrics, plot, config. If empty, runs/PRESET, or
    runs/PRESET-2 and so on where that exists; with --resume, the last of these."""
    resume: bool = False
    """Go on from the run's latest checkpoint, with its config and what further flags change."""
    step: int | None = None
    """With --resume, the step whose checkpoint to go on from; the latest if None."""
    steps: int | None = None
    """Steps to train for. A run that steps alone end resumes exactly, to the bit on a CPU. With
    --steps and no --minutes, or the other way round, only the one given counts."""
    minutes: float | None = None
    """Minutes of wall clock to train for, compilation and validation included. The learning rate
    follows whichever of steps and minutes is further on."""
    mesh: str = ""
    """Devices by axis, as data=2,seq=4: data, expert and fsdp (rows; expert also experts, fsdp all
    parameters), seq (time), tensor (heads and features), pipe (blocks). If empty, one device."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How what lies over a mesh is exchanged."""
    emulate_devices: int = 0
    """Make this many devices of the CPU, to try a mesh on; 0: use the devices there are."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
    """The processes of this start; a resumed run is told again."""
    seed: int = 0
    """Decides the first parameters and the order of the data."""
    accumulate: int = 1
    """Equal parts that a batch's rows are split into, one after the other; the update is the same,
    the memory that of one part. What evens experts' loads, and a capacity, is of each part."""
    validate_every: int = 250
    """Steps between evaluations on held-out data; 0: only at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Latest checkpoints that are kept, besides the best on held-out data."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl and TensorBoard."""
    profile: bool = False
    """Write a trace of steps 5 to 10 to the run's folder `profile`, for xprof or Perfetto."""
    plot: bool = True
    """Draw loss.png at the end (package matplotlib, extra `train`)."""
    tensorboard: bool = True
    """Write metrics for TensorBoard to the run's folder `tensorboard` (package tensorboardX, extra
    `train`)."""
    wandb: str = ""
    """Project of Weights & Biases to log to (package wandb, extra `wandb`); none if empty."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}; it must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes}; it must be more than 0")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed}; it must be less than {2**31}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {least}")

    @property
    def folder(self) -> Path:
        return Path(self.run)


LEAST = {
    "seed": 0,
    "accumulate": 1,
    "emulate_devices": 0,
    "validate_every": 0,
    "save_every": 0,
    "keep": 1,
    "log_every": 1,
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Everything needed to build the run again, as JSON types."""
    return {"task_name": task_name(config.task)} | dataclasses.asdict(config)


def task_name(task: Any) -> str:
    return next(name for name, kind in TASKS.items() if kind is type(task))


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Raises ValueError for what is not the config of a run."""
    values = dict(values)
    name = values.pop("task_name", None)
    if name not in TASKS:
        raise ValueError(f"not the config of a run: its task {name!r} is not one of {list(TASKS)}")
    return _build(TrainConfig, values | {"task": _build(TASKS[name], values.get("task", {}))})


def read(path: Path) -> TrainConfig:
    """The config of a run's config.json, with what else its task left there."""
    try:
        config = from_json(json.loads(path.read_text("utf-8")))
        return dataclasses.replace(config, task=config.task.beside(path.parent))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist; {path.parent} is not a run of train") from None
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the config of a run: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Which fields of two configs differ, as flags with both values."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        found = []
        for field in dataclasses.fields(ours):
            inner = f"{name}.{field.name}" if name else field.name
            found += differences(getattr(ours, field.name), getattr(theirs, field.name), inner)
        return found
    return [] if ours == theirs else [f"{name} is {ours!r}, was {theirs!r}"]


def _build(kind: Any, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    if not values.keys() <= known:
        unknown = ", ".join(sorted(values.keys() - known))
        raise ValueError(f"not the config of a run: {kind.__name__} has no {unknown}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            value = _build(hints[name], value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
