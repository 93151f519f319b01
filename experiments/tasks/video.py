"""Next frames: bouncing digits predicted a frame ahead, and rolled out far beyond."""

import dataclasses
import functools
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ...models import Video, VideoConfig
from ..datasets.bouncing import clips, digits
from ..plots import film
from ..rollouts import by_frame, generated, seconds_per_frame
from . import Batch, Metrics, Score
from .base import ModelTask, next_commands

ALL = slice(None)
SHOWN = 10  # frames of the film strip
ORDINARY = 256  # training clips that the mean of all frames is taken of


@dataclasses.dataclass(frozen=True)
class VideoTask(ModelTask):
    """A model of video, and the clips that it learns."""

    kind: ClassVar[type[Video]] = Video
    unit: ClassVar[str] = "frames"
    measure: ClassVar[str] = "half squared plus half absolute error, summed over a frame's pixels"

    rows: int = 8
    """Clips a step."""
    frames: int = 32
    """Frames of a training clip that are read, and one more that is predicted."""
    digit: int = 12
    """Height and width of a digit, in pixels."""
    digits: int = 2
    """Digits of a clip."""
    speed: float = 0.15
    """The way of a digit from frame to frame, where the room that it leaves has sides of 1."""
    heldout_batches: int = 4
    """Batches of an evaluation, of digits that are never trained on."""
    condition: int = 16
    """Frames that a roll-out is given."""
    rollout: int = 64
    """Frames that it generates then."""
    rollouts: int = 32
    """Clips that are rolled out."""
    model: VideoConfig = field(default_factory=VideoConfig)
    """The model."""

    def __post_init__(self):
        names = ("rows", "frames", "digit", "digits", "heldout_batches")
        for name in (*names, "condition", "rollout", "rollouts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if not 0 <= self.speed < 1:
            raise ValueError(f"speed={self.speed}; it must be at least 0 and less than 1")
        if self.digit > min(self.model.size):
            height, width = self.model.size
            raise ValueError(f"digit={self.digit} is larger than frames of {height} x {width}")
        if self.model.channels != 1:
            raise ValueError(f"model.channels={self.model.channels}; these clips have 1")

    def check(self) -> None:
        digits(self.digit, heldout=False)  # says if scikit-learn is missing

    def clips(self, key: tuple[int, ...], rows: range, frames: int, heldout: bool) -> np.ndarray:
        shape = {"frames": frames, "size": self.model.size, "digit": self.digit}
        moves = {"count": self.digits, "speed": self.speed, "heldout": heldout}
        return clips(key, rows, **shape, **moves)

    def batch(self, key: tuple[int, ...], heldout: bool, rows: slice = ALL) -> Batch:
        chosen = range(*rows.indices(self.rows))
        clip = self.clips(key, chosen, self.frames + 1, heldout)
        return {"frames": clip[:, :-1], "targets": clip[:, 1:]}

    def batches(self, seed: int, step: int, rows: slice = ALL) -> Batch:
        return self.batch((0, seed, step), False, rows)

    def loss(
        self, model: Video, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Half the squared and half the absolute error, summed over pixels, a mean over frames.

        `mse` is the squared error, a mean over pixels; they go from -1 to 1.
        """
        after, _ = model(batch["frames"])
        error = after.astype(jnp.float32) - batch["targets"]
        pixels, squared = error[0, 0].size, jnp.mean(error**2)
        loss = 0.5 * pixels * (squared + jnp.mean(jnp.abs(error)))
        weight = jnp.asarray(error.shape[0] * error.shape[1], jnp.float32)
        return loss, (None, {"loss": loss, "weight": weight, "mse": squared})

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        found: list[Metrics] = []
        for i in range(self.heldout_batches):
            found.append(score(functools.partial(self.batch, (1, 0, i), True), None)[0])
        return {name: float(np.mean([one[name] for one in found])) for name in ("loss", "mse")}

    def report(self, model: Video | None, heldout: dict[str, float], run: str) -> str:
        lines = next_commands(run, "evaluate", "train")
        return "\n".join([*lines, f"held-out mean squared error: {heldout['mse']:.4f}"])

    def examine(self, model: Video, folder: Path | None) -> dict[str, Any]:
        """Roll-outs of held-out clips: error and time of a frame by horizon, pictures of them."""
        frames = self.condition + self.rollout
        truth = self.clips((2, 0, 0), range(self.rollouts), frames, True)
        given, truth = truth[:, : self.condition], truth[:, self.condition :]
        made = generated(model, given, self.rollout)
        seconds = seconds_per_frame(model, given, self.rollout)
        ordinary = self.clips((3, 0, 0), range(ORDINARY), self.frames, False).mean((0, 1))
        errors = {
            "model": by_frame(made, truth),
            "the last frame, copied": by_frame(given[:, -1:], truth),
            "the mean of all frames": by_frame(ordinary, truth),
        }
        marks = [h for h in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if h <= self.rollout]
        print(f"{'horizon (frames)':>24}" + "".join(f"{h:>9}" for h in marks))
        for name, error in errors.items():
            print(f"{name:>24}" + "".join(f"{error[h - 1]:>9.4f}" for h in marks), flush=True)
        for first, last, each in seconds:
            print(f"frames {first} to {last}: {1e3 * each:.2f} ms each", flush=True)
        if folder is not None:
            film.curves(folder / "rollout.png", errors, seconds, folder.name)
            every = max(1, self.rollout // SHOWN)
            film.strip(folder / "film.png", truth[0], made[0], every)
            film.moving(folder / "rollout.gif", truth[:4], made[:4])
            for name in ("rollout.png", "film.png", "rollout.gif"):
                print(folder / name)
        rounded = {name: [round(float(e), 6) for e in error] for name, error in errors.items()}
        times = [dict(zip(("from", "to", "seconds"), one, strict=True)) for one in seconds]
        about = {"condition": self.condition, "clips": self.rollouts, "mse": rounded}
        return {"rollout": about | {"seconds_per_frame": times}}
