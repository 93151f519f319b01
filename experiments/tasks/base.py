"""What tasks share whose model is a `Backbone` from one dataclass: parameters, layout, no state."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ...models import by_layer, decayed, from_layers, rebalanced
from ...models.block import runs
from ...models.partition import shardings, state_shardings
from ...models.pattern import parse
from ...sharding.schedule import PLAIN, Schedule
from . import Metrics

Same = TypeVar("Same", bound="ModelTask")


def means(found: Iterable[Metrics], names: Iterable[str]) -> dict[str, float]:
    """Of the metrics of batches, each as heavy as its `weight`."""
    found = list(found)
    weights = [float(metrics["weight"]) for metrics in found]
    return {
        name: float(np.average([float(metrics[name]) for metrics in found], weights=weights))
        for name in names
    }


def held(total: int, first: int, count: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Which of `total` make these rows of a batch of `count` from `first` on, and their weights.

    Past the last one come copies of it, without weight.
    """
    index = np.arange(first, first + count)[rows]
    return np.minimum(index, total - 1), (index < total).astype(np.float32)


class ModelTask:
    """A task's half that says nothing of its data; the other half is a frozen dataclass."""

    kind: ClassVar[type[Any]]
    """The model's class, which takes the config `model` and `rngs`."""
    model: Any
    """The model's config."""

    def check(self) -> None:
        """Most flags are refused where they are parsed."""

    def on(self: Same, over: Mesh, how: Schedule) -> Same:
        """This task with its blocks stacked for a mesh's pipeline; ValueError if they cannot be."""
        stages = over.shape["pipe"]
        model = dataclasses.replace(self.model, pipeline=(stages, how.rounds))
        runs(model)  # says whether the stages are alike
        kinds = parse(model.pattern, model.depth)
        for name, value in vars(how).items():
            given = name.startswith("expert") and value != getattr(PLAIN, name)
            if given and "moe" not in {kind.mlp for kind in kinds}:
                raise ValueError(f"schedule.{name}={value}: pattern {model.pattern!r} has no moe")
        changed: Any = dataclasses.replace(self, model=model)  # type: ignore[type-var]
        return changed

    def build(self, rngs: nnx.Rngs) -> Any:
        return self.kind(self.model, rngs=rngs)

    def init_state(self, model: Any) -> Any:
        """Rows start fresh."""
        return None

    def settled(self, params: Any, metrics: Metrics) -> Any:
        return rebalanced(self.model, params, metrics.get("moe_load"))

    def derived(self, loss: float) -> dict[str, float]:
        return {}

    def files(self) -> dict[str, str]:
        return {}

    def beside(self: Same, folder: Path) -> Same:
        return self

    def examine(self, model: Any, folder: Path | None) -> dict[str, Any]:
        return {}

    def decayed(self, params: Any) -> Any:
        return decayed(params)

    def shardings(self, params: Any, over: Mesh) -> Any:
        return shardings(self.model, params, over)

    def state_shardings(self, state: Any, over: Mesh) -> Any:
        return state_shardings(state, over)

    def by_layer(self, params: Any) -> dict[str, Any]:
        return by_layer(self.model, params)

    def from_layers(self, flat: dict[str, Any]) -> Any:
        return from_layers(self.model, flat, self.kind)


COMMANDS = {
    "generate": "generate --checkpoint {} --prompt 'def '",
    "evaluate": "evaluate --checkpoint {}",
    "train": "train --run {} --resume --minutes 30",
}


def next_commands(run: str, *names: str) -> list[str]:
    """Lines for the end of a run: what to type next."""
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    commands = (COMMANDS[name].format(shlex.quote(run)) for name in names)
    return [
        "try next:",
        *(f"  {shlex.quote(python)} -m scanax.experiments.{command}" for command in commands),
        "",
    ]
