"""Pictures of roll-outs: error and time by horizon, a film strip, a moving one."""

from pathlib import Path

import numpy as np


def curves(
    path: Path,
    errors: dict[str, np.ndarray],
    seconds: list[tuple[int, int, float]],
    title: str,
) -> None:
    """A PNG of squared error, and of seconds a generated frame, against the horizon in frames."""
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = zip(errors.items(), ("-", "--", ":"), ("tab:blue", "0.4", "0.4"), strict=False)
    for (name, error), style, color in styles:
        left.plot(np.arange(1, len(error) + 1), error, style, color=color, label=name)
    left.set(ylabel="mean squared error of a pixel (from -1 to 1)", ylim=(0, None))
    left.legend(loc="lower right")
    for first, last, each in seconds:
        right.plot((first, last), (1e3 * each,) * 2, color="tab:blue", linewidth=2)
    right.set(ylabel="milliseconds a generated frame, one clip", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("horizon (frames after the last that was given)")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path)


def strip(path: Path, truth: np.ndarray, made: np.ndarray, every: int) -> None:
    """A PNG of every so many frames (T, H, W, 1) of a clip: the truth, below it what was made."""
    from matplotlib.figure import Figure

    chosen = [*range(0, len(truth), every)]
    if chosen[-1] != len(truth) - 1:
        chosen.append(len(truth) - 1)
    figure = Figure(figsize=(1.1 * len(chosen) + 0.6, 2.7), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(chosen), squeeze=False)
    for row, (name, clip) in zip(grid, (("truth", truth), ("generated", made)), strict=True):
        for axes, number in zip(row, chosen, strict=True):
            axes.imshow(clip[number, ..., 0], cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for axes, number in zip(grid[1], chosen, strict=True):
        axes.set_xlabel(f"{number + 1}")
    figure.supxlabel("frames after the last that was given", fontsize=10)
    figure.savefig(path)


def moving(path: Path, truth: np.ndarray, made: np.ndarray, scale: int = 4) -> None:
    """A GIF of clips (N, T, H, W, 1) side by side: the truth above, what was made below."""
    from PIL import Image  # it comes with matplotlib

    both = np.stack([truth, made])[..., 0]  # (2, N, T, H, W)
    both = np.pad(both, [(0, 0)] * 3 + [(1, 1)] * 2, constant_values=0)  # a grey line between
    bytes_ = np.clip(127.5 * (both + 1), 0, 255).astype(np.uint8)
    frames = bytes_.transpose(2, 0, 3, 1, 4).reshape(truth.shape[1], 2 * both.shape[3], -1)
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=100, loop=0)
