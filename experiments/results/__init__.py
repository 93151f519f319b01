"""Claims that are measured: a file each, whose `experiment` says how; `reproduce` runs them."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import trained

# What an experiment finds, as JSON: `columns`, names with units; `rows`, a list of cells each;
# `found`, the answer in a sentence; `notes`, sentences; `curves` and `times`, by label points of a
# plot that the rows do not hold; `pictures`, by label PNGs besides the plot, of which results keep
# copies. `reproduce` adds what ran, on what, when and for how long.
Measured = dict[str, Any]

FLAT = 1.15  # times as long, or as quick, that still count as the same

# Mixers by their names in a pattern: what papers call them.
MIXER_NAMES = {
    "gla": "GLA",
    "retention": "RetNet",
    "lightning": "Lightning",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "aaren": "Aaren",
    "attention": "attention",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How an experiment is run."""

    seeds: tuple[int, ...]
    """Each measurement is made once with each of these."""
    small: bool
    """Whether sizes are such that it takes seconds, and the figures mean nothing."""
    jobs: int
    """How many runs that train go at once, a core each."""
    folder: Path
    """Where runs that train are kept."""

    def ended(
        self, models: Mapping[str, Iterable[str]], evaluate: bool = True
    ) -> dict[str, list[trained.Ended]]:
        """Models, by name the flags of `train`: how each ended with each of the seeds."""
        return trained.each_seed(models, self.seeds, self.folder, self.jobs, evaluate)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A claim, what measures it, and what draws the measurement to a PNG of a given path."""

    claim: str
    run: Callable[[Setting], Measured]
    draw: Callable[[Measured, Path], None]


def verdict(failing: Iterable[str]) -> str:
    """How an answer begins, by what the claim does not hold for."""
    *others, last = ("", *failing)
    listed = " and ".join(part for part in (", ".join(others[1:]), last) if part)
    return f"does not hold for {listed}: " if listed else "holds: "


def names() -> list[str]:
    """Of the experiments, the files of this folder."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem.replace("_", "-") for file in files if file.stem != "__init__")


def find(name: str) -> Experiment:
    """The experiment of a name; ValueError if there is none."""
    if name not in names():
        raise ValueError(f"experiment {name!r} is not one of {', '.join(names())}")
    return importlib.import_module(f".{name.replace('-', '_')}", __package__).experiment
