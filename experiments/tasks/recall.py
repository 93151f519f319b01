"""Recall of what a row said earlier: selective copying, induction heads, associative recall."""

import dataclasses
from collections.abc import Callable
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ...layers import router
from ...models import LM, LMConfig, merge, split
from ..datasets import recall
from ..plots.curves import curve
from . import Batch, Metrics, Score
from .base import ModelTask, next_commands

TRAINING, HELDOUT, EXAMINED = 0, 1, 2
LENGTHS = tuple(2**n for n in range(6, 14))
PIECE = 256  # tokens that are read at once, so that long rows take little memory
READ, TIMES = 16, 8  # rows at once, and how often, for a point of a curve


@dataclasses.dataclass(frozen=True)
class RecallTask(ModelTask):
    """Rows that ask for what they said; see experiments/datasets/recall.py."""

    unit: ClassVar[str] = "answers"
    measure: ClassVar[str] = "nats"
    kind: ClassVar[type[Any]] = LM

    problem: Literal["selective-copying", "induction", "mqar"] = "selective-copying"
    """Selective copying: data tokens among noise, to be said in order. Induction: what followed a
    trigger. Multi-query associative recall (mqar): key-value pairs, the values to be said."""
    rows: int = 8
    """Rows a step, all parts of an accumulated step together."""
    length: int = 256
    """Tokens of a row."""
    items: int = 16
    """Data tokens to copy, key-value pairs, or answers of an induction (`evaluate` asks for 1)."""
    alpha: float = 1.0
    """Of mqar: a key is asked for g tokens after the last pair with probability in proportion to
    g^(alpha - 1), so 1 is uniform, and Zoology's 0.01 asks soon."""
    heldout_batches: int = 8
    """Batches of a validation."""
    final_batches: int = 32
    """Batches of the evaluation at the end of the run."""
    model: LMConfig = field(
        default_factory=lambda: LMConfig(vocab=16, width=64, depth=2, pattern="mamba")
    )
    """The decoder; its vocab is the problem's."""

    def __post_init__(self):
        for name in ("rows", "items", "heldout_batches", "final_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.problem != "mqar" and self.alpha != 1:
            raise ValueError(f"alpha={self.alpha} is for mqar; {self.problem} has no queries")

    def check(self) -> None:
        self.batches(0, 0, slice(1))  # says what sizes do not fit

    def batches(self, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        return self.drawn((TRAINING, seed, step), rows)

    def drawn(
        self,
        key: recall.Key,
        rows: slice = slice(None),
        *,
        length: int | None = None,
        items: int | None = None,
    ) -> Batch:
        """Some of a batch's rows, longer or with other items if it is said."""
        items = items or self.items
        sizes = {"length": length or self.length, "vocab": self.model.vocab}
        which = range(self.rows)[rows]
        match self.problem:
            case "selective-copying":
                return recall.selective_copying(key, which, items=items, **sizes)
            case "induction":
                return recall.induction(key, which, items=items, **sizes)
            case "mqar":
                return recall.mqar(key, which, pairs=items, alpha=self.alpha, **sizes)

    def loss(
        self, model: LM, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Mean nats of the answers, and what routers add.

        Metrics: `accuracy`, the share of answers whose likeliest token is right; `exact`, the share
        of rows that have every answer right.
        """
        x, _, aux = model.hidden(batch["tokens"], reset=batch["reset"], key=key)
        logits, targets, due = model.logits(x), batch["targets"], batch["weights"] > 0
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        weight = due.sum(dtype=jnp.float32)
        loss = jnp.where(due, nll, 0).sum() / weight
        right = jnp.argmax(logits, axis=-1) == targets
        added, figures = router.losses(self.model.moe.router, aux)
        metrics = {
            "loss": loss,
            "weight": weight,
            "accuracy": (right & due).sum(dtype=jnp.float32) / weight,
            "exact": (right | ~due).all(axis=1).mean(dtype=jnp.float32),
        }
        return loss + added, (None, metrics | figures)

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Means over rows that are the same in every run, whatever its seed."""
        count = self.final_batches if final else self.heldout_batches
        found = [score(partial(self._heldout, i), None)[0] for i in range(count)]
        return {
            name: float(np.mean([float(metrics[name]) for metrics in found]))
            for name in ("loss", "accuracy", "exact")
        }

    def _heldout(self, index: int, rows: slice = slice(None)) -> Batch:
        return self.drawn((HELDOUT, 0, index), rows)

    def report(self, model: LM | None, heldout: dict[str, float], run: str) -> str:
        """What to type next, and the share of held-out answers and of whole rows that are right."""
        right = f"held-out answers right: {100 * heldout['accuracy']:.1f}%"
        right += f", whole rows: {100 * heldout['exact']:.1f}%"
        return "\n".join([*next_commands(run, "evaluate", "train"), right])

    def examine(self, model: LM, folder: Path | None) -> dict[str, Any]:
        """Accuracy by an item's number, a row's length or the pairs; PROBLEM.png is the curve.

        And the bytes of the model's state after a training row: what it remembers in.
        """
        read, trained = reader(model), None
        match self.problem:
            case "selective-copying":
                right = self._right(read)[:, -self.items :]
                over, points = "item", list(enumerate(right.mean(axis=0).tolist(), 1))
            case "induction":
                over, trained = "length", self.length
                right = [self._right(read, length=n, items=1)[:, -1].mean() for n in LENGTHS]
                points = list(zip(LENGTHS, map(float, right), strict=True))
            case "mqar":
                most = min(self.length // 3, (self.model.vocab - 1) // 2)
                counts = [2**n for n in range(most.bit_length())]
                right = [self._right(read, items=n).sum(axis=1).mean() for n in counts]
                over, trained = "pairs", self.items
                points = [(n, float(x / n)) for n, x in zip(counts, right, strict=True)]
        if folder is not None:
            title = f"{self.problem}: {self.model.pattern}"
            png = curve(points, over, "share of answers that are right", title, trained)
            (folder / f"{self.problem}.png").write_bytes(png)
        state = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1, self.length)))
        size = sum(x.size * x.dtype.itemsize for x in state)
        found = [{over: x, "accuracy": y} for x, y in points]
        return {"state_bytes": size, f"by_{over}": found}

    def _right(
        self,
        read: Callable[[Batch], np.ndarray],
        length: int | None = None,
        items: int | None = None,
    ) -> np.ndarray:
        """Where rows (READ x TIMES, length) that no run is trained on are answered right.

        They are read in pieces, the state carried from each to the next.
        """
        task = dataclasses.replace(self, rows=READ)
        found = []
        for i in range(TIMES):
            batch = task.drawn((EXAMINED, 0, i), length=length, items=items)
            found.append((read(batch) == batch["targets"]) & (batch["weights"] > 0))
        return np.concatenate(found)


def reader(model: LM) -> Callable[[Batch], np.ndarray]:
    """The model's likeliest token everywhere in a batch (rows, length), int32."""
    graphdef, params, rest = split(model)

    @jax.jit
    def piece(params, rest, tokens, reset, state):
        logits, state = merge(graphdef, params, rest)(tokens, state, reset)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), state

    def read(batch):
        rows, length = batch["tokens"].shape
        state, found = model.init_state(rows, length), []
        for at in range(0, length, PIECE):
            part = (jnp.asarray(batch[name][:, at : at + PIECE]) for name in ("tokens", "reset"))
            tokens, state = piece(params, rest, *part, state)
            found.append(np.asarray(tokens))
        return np.concatenate(found, axis=1)

    return read
