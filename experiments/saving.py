"""Writing checkpoints in the background; kill -9 at any moment leaves a usable latest one.

Every process writes what lies on its devices; the first seals the checkpoint once all have, and
tells the others.
"""

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from . import hosts
from .checkpoint import best, crc32, named, steps, write_manifest

_FULL = {errno.ENOSPC: "No space left", errno.EFBIG: "File too large", errno.EDQUOT: "quota"}


def _without_tracebacks(record: logging.LogRecord) -> bool:
    """Orbax also logs, with tracebacks and thrice, each error that it raises and we report."""
    return "_SignalingThread" not in record.getMessage()


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it are as they were."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a run's folder for this process, whose end gives it up. ValueError if it is taken.

    For the first process of a run. Not on Windows, which cannot lock a folder.
    """
    if os.name == "nt" or not hosts.first():
        yield
        return
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains in {folder}: stop it, or wait for its end"
            ) from None
        yield
    finally:
        os.close(held)


class Saver:
    """Saves a run's checkpoints in the background, one at a time; none is ever skipped.

    config and files (name -> text) are written into each checkpoint. The last `keep` checkpoints
    are kept, and with them the one with the lowest metric. resumed: the step this run goes on from;
    later ones (of a run that went on from a damaged or unwanted end) give way to the next save.
    An error of a save in the background is raised by the next `save` or `wait`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        keep: int = 3,
        resumed: int | None = None,
        files: Mapping[str, str] | None = None,
    ):
        self.directory, self.keep, self.last = Path(directory).absolute(), keep, resumed
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints; it must be at least 1")
        if resumed is None and (found := steps(directory)):
            raise ValueError(
                f"{directory} already holds checkpoints up to step {found[-1]}: resume from it, or "
                "name another directory"
            )
        self._texts = {**(files or {}), "config.json": json.dumps(config, indent=2)}
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[int] | None = None
        logging.getLogger("absl").addFilter(_without_tracebacks)
        if self.directory.is_dir() and hosts.first():
            for name in os.listdir(self.directory):
                if re.match(r"\d+\.(saving|removing)", name):  # left by a process that was killed
                    shutil.rmtree(self.directory / name)

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        *,
        metric: float | None = None,
    ) -> None:
        """Begin to save `state`, a pytree of arrays, once the save before it is complete.

        The arrays may be donated as soon as this returns. metadata: a small dict for JSON. metric:
        what the best checkpoint has least of; a checkpoint without one is never the best.
        """
        self.wait()
        if self.last is not None and step <= self.last:
            raise ValueError(f"{step=} does not come after {self.last}, the last step saved")
        arrays = named(state)
        types = {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}
        manifest = {
            "step": step,
            "metric": metric,
            "metadata": dict(metadata or {}),
            "arrays": types,
        }
        json.dumps(manifest)  # metadata that is not JSON is the caller's error, raised here
        size = sum(a.nbytes for a in arrays.values())
        # Orbax refuses arrays without elements; their types say all there is to them.
        arrays = {k: a if isinstance(a, jax.Array) else np.array(a) for k, a in arrays.items()}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            response = ocp.save_async(
                str(self.directory / f"{step}.saving"), {k: a for k, a in arrays.items() if a.size}
            )
        except Exception as error:
            raise self._failed(step, size, error) from error
        floor = step - 1 if self.last is None else self.last
        self._pending = self._worker.submit(self._finish, response, manifest, size, floor)

    def wait(self) -> None:
        """Return when the save under way is complete, or raise its SaveError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.last = pending.result()

    def _finish(self, response: Any, manifest: dict[str, Any], size: int, floor: int) -> int:
        step = manifest["step"]
        try:
            response.result()
            hosts.gather("written", step)
            if hosts.first():
                self._seal(manifest, floor)
            hosts.gather("sealed", step)
        except Exception as error:
            raise self._failed(step, size, error) from error
        return step

    def _seal(self, manifest: dict[str, Any], floor: int) -> None:
        """Give the checkpoint its manifest and its name, and remove those it makes superfluous."""
        folder = self.directory / f"{manifest['step']}.saving"
        for name, text in self._texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest["files"] = {
            path.relative_to(folder).as_posix(): [path.stat().st_size, crc32(path)]
            for path in files
        }
        write_manifest(folder, manifest)
        self._remove(other for other in steps(self.directory) if other > floor)
        folder.rename(self.directory / str(manifest["step"]))
        recent, lowest = steps(self.directory)[-self.keep :], best(self.directory)
        self._remove(
            other for other in steps(self.directory) if other not in recent and other != lowest
        )

    def _remove(self, unwanted: Iterable[int]) -> None:
        for step in list(unwanted):
            aside = self.directory / f"{step}.removing"
            (self.directory / str(step)).rename(aside)
            shutil.rmtree(aside)

    def _failed(self, step: int, size: int, error: Exception) -> SaveError:
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        for path in self.directory.glob(f"{step}.saving*"):
            shutil.rmtree(path, ignore_errors=True)
        reason = f"{type(error).__name__}: {error}"
        # of Orbax's barriers: CoordinationServiceError, or TimeoutError with a like text
        if hosts.several() and "coordination" in reason.lower():
            reason = "another process ended while all were writing it"
        elif "gloo" in reason.lower() or isinstance(error, jax.errors.JaxRuntimeError):
            reason = hosts.cut_off(reason) if hosts.several() else reason
        if getattr(error, "errno", None) in _FULL or any(t in str(error) for t in _FULL.values()):
            reason = (
                "the disk is full or a file size limit was reached (the arrays take "
                f"{size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free)"
            )
        complete = steps(self.directory)
        rest = f"step {complete[-1]}" if complete else "none"
        return SaveError(
            f"checkpoint {self.directory / str(step)} could not be saved: {reason}; the last "
            f"complete checkpoint is {rest}"
        )
