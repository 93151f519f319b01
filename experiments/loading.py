"""A model back from its files alone, a run's or published ones: config, weights, tokenizer."""

import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from ..models.layout import assembled
from ..models.pretrained import Pretrained
from ..models.pretrained.compare import difference
from ..sharding import mesh
from . import checkpoint, hosts
from .config import TrainConfig, from_json, task_name
from .datasets.text import DataConfig
from .datasets.tokenizer import Bytes, TokenizerJson
from .datasets.tokenizer import load as load_tokenizer
from .step import Place, blueprint
from .tasks.lm import LMTask

PUBLISHED_LENGTH = 512  # tokens of a sequence, where no training says how many
LOGITS = 1024  # tokens whose logits exist at once: published vocabularies are large


class Found(NamedTuple):
    """Weights in files: what they are, and the numbers when they are asked for."""

    config: TrainConfig
    step: int | None
    """None: they are published, not a run's."""
    folder: Path
    """Where they lie; a run's checkpoint has its own inside the run's."""
    read: Callable[[Any, Mesh], Any]
    """read(task, over): the parameters as a task has them, each straight to where it lies on a
    mesh. ValueError if the task's model is another."""


class Loaded(NamedTuple):
    """A trained model; `tokenizer` is None where nothing says what its tokens are."""

    config: TrainConfig
    model: Any
    step: int | None
    """None: it is published, not a run's."""
    folder: Path
    """Where its weights lie; a run's checkpoint has its own inside the run's."""
    tokenizer: Bytes | TokenizerJson | None

    @property
    def without(self) -> str:
        """Why it has no tokenizer."""
        if self.step is None:
            return "has no tokenizer.json"
        return "was trained on token arrays without a tokenizer"


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


def load(
    directory: str | Path,
    step: Step = None,
    over: Mesh | None = None,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    kind: type[Any] = LMTask,
    stacked: bool = True,
) -> Loaded:
    """The model in a run's directory, a published one, or at a Hub id.

    step: of a run: a number, "best" (lowest held-out loss), None (latest). dtype: of published
    weights and of what is computed with them; None: float32. tokenizer: a tokenizer.json or
    `bytes`; None: what lies beside the weights. It is read straight onto a mesh (None: the first
    device): each device reads its part. kind: the task that it must be of. stacked: whether like
    blocks are stacked, else they stand one by one, as decoding is quickest. Raises ValueError in
    one line for a directory that is neither, another task, a step it does not have, damaged files.
    """
    found = find(directory, step, dtype)
    over = mesh.make() if over is None else over
    task = found.config.task
    if not isinstance(task, kind):
        raise ValueError(
            f"{directory} is a run of the task {task_name(task)}, not a language model; "
            "scanax.experiments.evaluate reads it"
        )
    if found.step is None:
        model = dataclasses.replace(
            task.model, loss_chunk=LOGITS, vocab_multiple=over.shape["tensor"]
        )
        task = dataclasses.replace(task, model=model)
    if not stacked:
        task = dataclasses.replace(task, model=dataclasses.replace(task.model, stacked=False))
    if tokenizer is not None:
        data = dataclasses.replace(task.data, tokenizer=tokenizer)
        task = dataclasses.replace(task, data=data)
    known = _tokenizer(task, found.step is None)  # what is wrong with it is said before the wait
    model = assembled(task.build, found.read(task, over), over)
    config = dataclasses.replace(found.config, task=task)
    return Loaded(config, model, found.step, found.folder, known)


def find(directory: str | Path, step: Step = None, dtype: str | None = None) -> Found:
    """What `load` would read, from the files' headers; told apart by what is in the directory."""
    if published(directory):
        if step is not None:
            raise ValueError(f"step={step}: {directory} is a published checkpoint, without steps")
        return _published(directory, dtype or "float32")
    if dtype is not None:
        raise ValueError(f"dtype={dtype} is for published checkpoints; {directory} has its own")
    return _run(directory, step)


def published(directory: str | Path) -> bool:
    """Whether this is no run's: a directory with weights or another's config.json, or a Hub id."""
    folder = Path(directory).expanduser()
    if not folder.exists():
        parts = str(directory).split("/")  # runs/typo is no Hub id where there is a folder runs
        known = all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
        return len(parts) == 2 and known and not Path(parts[0]).exists()
    if not folder.is_dir() or checkpoint.steps(folder) or (folder / checkpoint.MANIFEST).is_file():
        return False
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        values = {"task_name": None}
    except (ValueError, OSError):
        values = None
    run = isinstance(values, dict) and "task_name" in values
    return not run or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.*"))


def _published(directory: str | Path, dtype: str) -> Found:
    weights = Pretrained(directory, dtype)
    beside = None if weights.tokenizer is None else str(weights.tokenizer)
    vocab = weights.config.vocab if beside is None else None  # for token arrays
    data = DataConfig(paths=(), tokenizer=beside, vocab=vocab)
    task = LMTask(model=weights.config, data=data, rows=8, length=PUBLISHED_LENGTH)

    def read(task, over):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            params = weights.params(task.model, blueprint(task, over)[2])
        for each in said if hosts.first() else ():
            print(f"warning: {each.message}", file=sys.stderr)
        return params

    return Found(TrainConfig(task=task, run=str(directory)), None, weights.folder, read)


def _run(directory: str | Path, step: Step) -> Found:
    latest = checkpoint.latest(directory)
    if isinstance(step, str):
        chosen = checkpoint.best(directory)
    else:
        chosen = latest if step is None else step
    if chosen is None:
        raise ValueError(f"{directory} has no best checkpoint: none was saved with a held-out loss")
    folder = Path(directory, str(chosen))
    config = from_json(checkpoint.load_config(directory, chosen))
    config = dataclasses.replace(config, task=config.task.beside(folder))

    def read(task, over):
        if changed := difference(task.model, config.task.model):
            raise ValueError(f"{directory} holds another model: {changed}")
        _, shapes, places = blueprint(task, over)
        flat = jax.eval_shape(task.by_layer, shapes)
        each = task.by_layer(jax.tree.map(lambda where, x: Place(where, x.shape), places, shapes))
        wanted = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=each[n].where)
            for n, x in flat.items()
        }
        saved = checkpoint.restore(directory, {"params": wanted}, chosen, part=True).state["params"]
        return jax.jit(task.from_layers, out_shardings=places)(saved)

    return Found(config, chosen, folder, read)


def _tokenizer(task: Any, bare: bool) -> Bytes | TokenizerJson | None:
    if not isinstance(task, LMTask):
        return None
    # a corpus of token arrays names its vocabulary; of 256 tokens, they are bytes
    if task.data.tokenizer is None and (bare or task.data.vocab not in (None, 256)):
        return None
    return load_tokenizer(task.data.tokenizer)
