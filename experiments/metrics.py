"""What a run says while it trains: metrics.jsonl, TensorBoard, W&B, a progress line."""

import contextlib
import importlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from . import hosts
from .config import TrainConfig, to_json

Row = dict[str, Any]


def check(config: TrainConfig) -> None:
    """Import what the flags ask for; ValueError naming the extra that brings what is missing."""
    wanted = (
        ("matplotlib", config.plot, "train", "--no-plot"),
        ("tensorboardX", config.tensorboard, "train", "--no-tensorboard"),
        ("wandb", config.wandb, "wandb", "no --wandb"),
    )
    for name, asked, extra, without in wanted:
        try:
            if asked:
                importlib.import_module(name)
        except ImportError:
            raise ValueError(
                f"the package {name} is missing: pip install 'scanax[{extra}]', or give {without}"
            ) from None


def read(folder: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if math.isfinite(value) else None


class Log:
    """One row a step, in every place that the config asks for; what is not finite is null.

    `step` steps were done before. Rows of later ones, left by a run that was killed after its last
    checkpoint, are dropped: those steps are done again.
    """

    def __init__(self, config: TrainConfig, step: int, wandb: Any):
        self.wandb = wandb
        self.folder = folder = config.folder
        kept = [row for row in read(folder) if row["step"] <= step]
        path, new = folder / "metrics.jsonl", folder / "metrics.jsonl.new"
        new.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        os.replace(new, path)
        self.file = path.open("a", encoding="utf-8")
        self.board = Board(folder / "tensorboard", step) if config.tensorboard else None

    def write(self, row: Row) -> None:
        try:
            self._write(row)
        except OSError as error:
            raise OSError(f"the log of {self.folder} cannot be written: {error.strerror}") from None

    def _write(self, row: Row) -> None:
        finite = {k: _finite(v) for k, v in row.items()}
        numbers = {k: v for k, v in row.items() if k != "step" and not isinstance(v, list)}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        if self.board is not None:
            self.board.write(row["step"], numbers)
        self._tell(lambda run: run.log(numbers, step=row["step"]))

    def close(self) -> None:
        """Rows are flushed as they are written; what a full disk did not take is left out."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.board is not None:
            self.board.close()
        self._tell(lambda run: run.finish())

    def _tell(self, what: Callable[[Any], None]) -> None:
        """To W&B, whose errors, of its own kinds, do not end a run."""
        if self.wandb is None:
            return
        try:
            what(self.wandb)
        except Exception as error:
            self.wandb = None
            print(f"train: goes on without Weights & Biases: {error}", file=sys.stderr)


class Board:
    """TensorBoard's event files, written at once: tensorboardX's own thread dies of a full disk."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(exist_ok=True)
        self.flushed = time.monotonic()
        self.writer = EventsWriter(str(folder / "events"), f".{step}")
        # a module made at run time, whose contents no checker sees
        self.kinds: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        start = self.kinds.SessionLog(status=self.kinds.SessionLog.START)
        self.add(step=step + 1, session_log=start)  # what was shown of later steps is withdrawn

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in numbers.items():
            self.add(step=step, summary=scalar(name, value))
        if time.monotonic() - self.flushed > 30:  # it waits for the disk
            self.writer.flush()
            self.flushed = time.monotonic()

    def add(self, **what: Any) -> None:
        self.writer.write_event(self.kinds.Event(wall_time=time.time(), **what))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.writer.close()


def start_wandb(config: TrainConfig) -> Any:
    """A W&B run of the id that this run's folder keeps, so that a resumed one goes on there."""
    if not config.wandb or not hosts.first():
        return None
    known = config.folder / "wandb_id"
    if not known.exists():
        known.write_text(secrets.token_hex(4), "utf-8")
    try:
        return importlib.import_module("wandb").init(
            project=config.wandb,
            name=config.folder.name,
            id=known.read_text("utf-8"),
            dir=str(config.folder),
            resume="allow",
            config=to_json(config),
        )
    except Exception as error:  # of its own kinds: no key, no network, no such project
        raise OSError(f"Weights & Biases did not start: {error}") from error


class Recorder:
    """Rows and the progress line from what steps return, one step late: the device never waits.

    Only the first process writes and shows them.
    """

    def __init__(self, config: TrainConfig, step: int, part: float, wandb: Any = None):
        self.config, self.unit = config, config.task.unit
        self.log = Log(config, step, wandb) if hosts.first() else None
        self.done = step
        self.waiting: tuple[Row, Any, float] | None = None
        self.heldout: Row = {}
        self.begun = self.mark = time.monotonic()
        self.first, self.speeds, self.drawn = part, [], 0.0

    def step(self, row: Row, numbers: Any, part: float) -> None:
        """`row` is known now, `numbers` is what the step returned; `part` of the run is done."""
        self.flush()
        self.waiting = row, numbers, part

    def add(self, heldout: dict[str, float]) -> None:
        """Held-out metrics of the last step; the time they took does not count as training."""
        self.heldout = {f"heldout_{name}": value for name, value in heldout.items()}
        if self.waiting is not None:
            self.waiting[0].update(self.heldout)
        elif self.log is not None:  # of the step that a run resumed from
            self.log.write({"step": self.done} | self.heldout)
        self.mark = time.monotonic()

    def flush(self) -> None:
        """Wait for the last step's numbers, write them and show them."""
        if self.waiting is None:
            return
        (row, numbers, part), self.waiting = self.waiting, None
        row |= {name: value.tolist() for name, value in jax.device_get(numbers).items()}
        if self.log is None:
            return
        row |= {self.unit: row.pop("weight")} | self.config.task.derived(row["loss"])
        now = time.monotonic()
        self.speeds = [*self.speeds[-19:], row[self.unit] / max(now - self.mark, 1e-9)]
        self.mark = now
        # the median: a step that compiled, or waited for a validation, is not the speed
        row[f"{self.unit}_per_second"] = sorted(self.speeds)[len(self.speeds) // 2]
        if row["step"] % self.config.log_every == 0 or "heldout_loss" in row:
            self.log.write(row)
        left = (now - self.begun) * (1 - part) / max(part - self.first, 1e-9)
        self.show(progress_line(row | self.heldout, self.unit, part, left), now)

    def show(self, text: str, now: float) -> None:
        """On a terminal drawn over; in a file a new line every 15 seconds."""
        terminal = sys.stderr.isatty()
        if now - self.drawn < (0.2 if terminal else 15):
            return
        self.drawn = now
        # to the line's start, and erase what is left of a longer one
        print(
            f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr
        )
        sys.stderr.flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Write what waits; another error under way is not replaced by one of writing."""
        try:
            with contextlib.suppress(*([] if kind is None else [OSError])):
                self.flush()
        finally:
            if self.log is not None:
                self.log.close()
        if self.log is not None and sys.stderr.isatty():
            print(file=sys.stderr)


def progress_line(row: Row, unit: str, part: float, left: float) -> str:
    """`42% step 310  loss 1.71  2.47 bits per byte  8,100 tokens/s  1:20 left  0 skipped`."""
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    bits = f"  {row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else ""
    if "accuracy" in row:
        bits += f"  {100 * row['accuracy']:.1f}% right"
    held = row.get("heldout_bits_per_byte", row.get("heldout_loss"))
    return (
        f"{100 * part:3.0f}% step {row['step']}  loss {row['loss']:.3f}{bits}"
        + (f"  {held:.3f} held out" if held is not None else "")
        + f"  {row[f'{unit}_per_second']:,.0f} {unit}/s  {clock} left  {row['skipped']:.0f} skipped"
    )
