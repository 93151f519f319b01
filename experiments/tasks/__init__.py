"""What the trainer knows of a task; each task is a frozen dataclass in a file of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ...sharding.schedule import Schedule

Batch = dict[str, np.ndarray]
Metrics = dict[str, Any]


# some rows of a batch, `rows=` says which: a process asks for those of its own devices only
Rows = Callable[..., Batch]
# `Task.loss` compiled, without its gradient: (the batch's rows, state) -> (metrics, state after it)
Score = Callable[[Rows, Any], tuple[Metrics, Any]]


@runtime_checkable
class Task(Protocol):
    """A model, its batches, a loss and an evaluation; the fields are the task's flags."""

    unit: ClassVar[str]
    """What a batch's weight counts, in the plural."""
    measure: ClassVar[str]
    """What the loss is in, as `nats`."""

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        ...

    def check(self) -> None:
        """Read what the flags name; raise a ValueError that says what is wrong with them."""
        ...

    def on(self, over: Mesh, how: Schedule) -> "Task":
        """This task with its model laid out for a mesh and a schedule; ValueError if it cannot."""
        ...

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with its first parameters."""
        ...

    def batches(self, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        """Some rows of the arrays of a step: a pure function, so resuming replays nothing.

        Arrays are (rows, time, ...), or (rows,) for what a row has one of.
        """
        ...

    def init_state(self, model: Any) -> Any:
        """The state that is carried from batch to batch, rows leading; None if there is none."""
        ...

    def loss(
        self, model: Any, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """(what training minimises, (the state after the batch, metrics)).

        The metrics are means over the batch, `loss` among them, and `weight`, the number of things
        (tokens) that they are means over. A key, in training only, is for what is random.
        """
        ...

    def settled(self, params: Any, metrics: Metrics) -> Any:
        """The parameters after an update, with what no gradient moves; most have nothing such."""
        ...

    def derived(self, loss: float) -> dict[str, float]:
        """The loss in other units, for logs and the progress line."""
        ...

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Held-out metrics, `loss` among them; a fuller evaluation at the end of a run."""
        ...

    def examine(self, model: Any, folder: Path | None) -> dict[str, Any]:
        """What `evaluate` measures besides: JSON, and pictures in a folder if there is one."""
        ...

    def report(self, model: Any, heldout: dict[str, float], run: str) -> str:
        """What is printed at the end of a run; no model where it lies over several processes."""
        ...

    def files(self) -> dict[str, str]:
        """Texts that a checkpoint needs besides its config, by file name."""
        ...

    def beside(self, folder: Path) -> "Task":
        """This task where it finds `files` in a folder: their copies instead of the originals."""
        ...

    def decayed(self, params: Any) -> Any:
        """A tree like the parameters: True where weight decay applies."""
        ...

    def shardings(self, params: Any, over: Mesh) -> Any:
        """A tree like the parameters of where each lies on a mesh."""
        ...

    def state_shardings(self, state: Any, over: Mesh) -> Any:
        """A tree like the state of `init_state`, of where each part lies on a mesh."""
        ...

    def by_layer(self, params: Any) -> dict[str, Any]:
        """Parameters under names that do not depend on how the model is run."""
        ...

    def from_layers(self, flat: dict[str, Any]) -> Any:
        """The inverse of `by_layer`."""
        ...
