"""Held-out metrics and pictures of a run whose task is not text: what `evaluate` does with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, use_abstract_mesh

from ..sharding import mesh
from .loading import Loaded
from .tasks import Score, Task


def scorer(model: Any, task: Task, over: Mesh) -> Score:
    """`task.loss` compiled, without its gradient, for batches whose rows lie over the mesh."""
    graphdef, variables = nnx.split(model)
    where = mesh.sharding(over, mesh.ENDS, "seq")

    @jax.jit
    def run(variables, batch, state):
        with use_abstract_mesh(over.abstract_mesh):
            model = nnx.merge(graphdef, variables)
            state = task.init_state(model) if state is None else state
            _, (state, metrics) = task.loss(model, batch, state)
        return metrics, state

    def score(rows: Callable[..., Any], state: Any) -> Any:
        return run(variables, mesh.spread(where, task.rows, rows), state)

    return score


def examine(loaded: Loaded, over: Mesh, folder: Path | None) -> dict[str, Any]:
    """The task's held-out metrics, and what it finds on a closer look, with pictures in a folder.

    The closer look is taken on one device; on a mesh of several only the metrics are.
    """
    task = loaded.config.task
    with jax.set_mesh(over):
        found = {"heldout": task.evaluate(scorer(loaded.model, task, over), final=True)}
    for name, value in found["heldout"].items():
        print(f"{name.replace('_', ' '):>24}{value:>16.4f}", flush=True)
    if over.size > 1:
        print(f"on {over.size} devices: the metrics alone; without --mesh, pictures as well")
        return found
    return found | task.examine(loaded.model, folder)
