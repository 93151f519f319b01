"""A model back from its checkpoint alone: config, weights, tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from ..sharding import mesh
from . import checkpoint
from .config import TrainConfig, from_json
from .step import Place, assembled, blueprint
from .tokenizer import Bytes, TokenizerJson
from .tokenizer import load as load_tokenizer


class Loaded(NamedTuple):
    """A trained model; `tokenizer` is None where it learned token arrays without one."""

    config: TrainConfig
    model: Any
    step: int
    folder: Path
    """The checkpoint's own, inside the run's."""
    tokenizer: Bytes | TokenizerJson | None


Step = int | Literal["best"] | None


def parse_step(text: str | None) -> Step:
    """A flag's value as `load` takes it. ValueError for what is neither a number nor `best`."""
    if text is None:
        return None
    if text == "best":
        return "best"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"step={text!r} is neither a number nor best")
    return int(text)


def load(directory: str | Path, step: Step = None, over: Mesh | None = None) -> Loaded:
    """The model that was saved at `step`: a number, "best" (lowest held-out loss), None (latest).

    It is read straight onto a mesh (None: the first device): each device reads its part.
    Raises ValueError in one line for a directory that is no run, a step it does not have, or a
    damaged checkpoint.
    """
    latest = checkpoint.latest(directory)
    if isinstance(step, str):
        chosen = checkpoint.best(directory)
    else:
        chosen = latest if step is None else step
    if chosen is None:
        raise ValueError(f"{directory} has no best checkpoint: none was saved with a held-out loss")
    folder = Path(directory, str(chosen))
    config = from_json(checkpoint.load_config(directory, chosen))
    task = config.task.beside(folder)
    config = dataclasses.replace(config, task=task)

    over = mesh.make() if over is None else over
    _, shapes, places = blueprint(task, over)
    flat = jax.eval_shape(task.by_layer, shapes)
    each = task.by_layer(jax.tree.map(lambda where, x: Place(where, x.shape), places, shapes))
    wanted = {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=each[n].where) for n, x in flat.items()
    }
    saved = checkpoint.restore(directory, {"params": wanted}, chosen, part=True).state["params"]
    model = assembled(task, saved, over)
    return Loaded(config, model, chosen, folder, _tokenizer(task))


def _tokenizer(task: Any) -> Bytes | TokenizerJson | None:
    # a corpus of token arrays names its vocabulary; of 256 tokens, they are bytes
    if task.data.tokenizer is None and task.data.vocab not in (None, 256):
        return None
    return load_tokenizer(task.data.tokenizer)
