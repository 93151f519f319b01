"""Pictures: the loss of a run by step, and of an evaluation by position."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import read
from .figure import begun, png


def loss_curve(folder: Path, measure: str, unit: str) -> Path:
    """Draw loss.png: training and held-out loss by step, in bits per byte where those are known."""
    rows = read(folder)
    bits = any("bits_per_byte" in row for row in rows)
    name = "bits_per_byte" if bits else "loss"
    figure, axes = begun(folder.name)
    train = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    held = [(row["step"], row.get(f"heldout_{name}")) for row in rows]
    held = [(step, value) for step, value in held if value is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color="0.65", linewidth=0.8, label="training batch")
    if held:
        axes.plot(*zip(*held, strict=True), color="tab:blue", marker="o", label="held out")
        step, value = held[-1]
        axes.annotate(f"{value:.2f}", (step, value), (0, 8), textcoords="offset points", ha="right")
    if len(train) > 20:  # the first steps would flatten everything after them
        axes.set_ylim(top=1.05 * sorted(v for _, v in train)[-len(train) // 20])
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (bits per byte)" if bits else f"loss ({measure}, mean over {unit})")
    if train:
        axes.legend(loc="upper right")  # where losses end up least
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def loss_by_position(results: dict[str, Any], title: str) -> bytes:
    """A PNG of the loss by tokens of context, a curve a length."""
    figure, axes = begun(title)
    shades = np.linspace(0.75, 0, len(results["lengths"]))  # of one colour: lengths have an order
    for result, shade in zip(results["lengths"], shades, strict=True):
        points = [
            (math.sqrt(b["from"] * b["to"]), b["nats_per_token"]) for b in result["by_context"]
        ]
        color = (shade, shade + 0.4 * (1 - shade), 0.7 + 0.3 * shade)
        label = f"length {result['length']:,}"
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    about = "tokens of the document read so far"
    if results["training_length"] is not None:
        axes.axvline(results["training_length"], color="0.6", linewidth=0.8, linestyle="--")
        about += " (dashed: training length)"
    axes.set_xlabel(about)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right")  # where losses end up least
    return png(figure)
