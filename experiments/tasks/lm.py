"""Language modelling: predict the next token of text, documents packed with `reset`."""

import dataclasses
import functools
import math
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from ...layers import router
from ...models import LM, LMConfig
from ..datasets import text as texts
from ..datasets.order2 import order2_bits_per_byte
from ..datasets.tokenizer import BYTES, Bytes
from ..sampling import Choice, Generator
from . import Batch, Metrics, Score
from .base import ModelTask, next_commands


@dataclasses.dataclass(frozen=True)
class LMTask(ModelTask):
    """A decoder and the text that it learns."""

    kind: ClassVar[type[LM]] = LM
    unit: ClassVar[str] = "tokens"
    measure: ClassVar[str] = "nats"

    rows: int = 16
    """Sequences a step, all parts of an accumulated step together."""
    length: int = 256
    """Tokens of a training sequence."""
    stream_state: bool = False
    """Each row goes on where it ended a step before, with the state it ended in (truncated
    backpropagation through time); not for attention without a window."""
    heldout_batches: int = 24
    """Batches of a validation, spread over the held-out text; 0: all of it."""
    final_batches: int = 0
    """Batches of the evaluation at the end of the run; 0: all held-out text."""
    model: LMConfig = field(default_factory=LMConfig)
    """The decoder."""
    data: texts.DataConfig = field(default_factory=texts.DataConfig)
    """The text."""

    def __post_init__(self):
        leasts = {"rows": 1, "length": 1, "heldout_batches": 0, "final_batches": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {least}")

    @functools.cached_property
    def corpus(self) -> texts.Corpus:
        return texts.corpus(**vars(self.data))

    def check(self) -> None:
        """Read the corpus; raise ValueError for what does not go together."""
        if self.stream_state and self.model.grows:
            raise ValueError(
                f"stream_state with pattern {self.model.pattern!r}: attention without a window has "
                "no state of fixed size; set --model.attention.window"
            )
        if self.corpus.vocab > self.model.vocab:
            raise ValueError(
                f"model.vocab={self.model.vocab}, but the corpus has {self.corpus.vocab} tokens"
            )

    def batches(self, seed: int, step: int, rows: slice = texts.ALL) -> Batch:
        read = texts.streams if self.stream_state else texts.windows
        return read(self.corpus.train, seed, step, batch=self.rows, length=self.length, rows=rows)

    def init_state(self, model: LM) -> Any:
        if not self.stream_state:
            return None
        # a ring of the window's size serves documents of any length
        return model.init_state(self.rows, self.model.attention.window or 1)

    def loss(
        self, model: LM, batch: Any, state: Any, key: Any = None
    ) -> tuple[Any, tuple[Any, Metrics]]:
        """Mean nats of the next token, over the tokens that have weight; and what routers add."""
        nll, state, aux = model.nll(
            batch["tokens"], batch["targets"], state=state, reset=batch["reset"], key=key
        )
        weights = batch["weights"]
        weight = weights.sum()
        # what has no weight may be anything, nan too
        loss = jnp.where(weights > 0, nll * weights, 0).sum() / jnp.where(weight, weight, 1)
        added, figures = router.losses(self.model.moe.router, aux)
        metrics = {"loss": loss, "weight": weight} | figures
        return loss + added, (state if self.stream_state else None, metrics)

    def evaluate(self, score: Score, final: bool = False) -> dict[str, float]:
        """Mean loss and bits per byte of held-out text, rows fresh or streaming as in training."""
        source, shape = self.corpus.heldout, {"batch": self.rows, "length": self.length}
        available = texts.evaluation_steps(source, **shape)
        count = (self.final_batches if final else self.heldout_batches) or available
        count = min(count, available)
        total = weight = 0.0
        state = None
        for i in range(count):
            # a state needs batches that go on from each other; without one they are spread
            index = i if self.stream_state else i * available // count
            metrics, state = score(partial(texts.evaluation, source, index, **shape), state)
            total += float(metrics["loss"]) * float(metrics["weight"])
            weight += float(metrics["weight"])
        return {"loss": total / weight} | self._bits(total / weight, source)

    def derived(self, loss: float) -> dict[str, float]:
        """Bits per byte, where the text's size in bytes is known."""
        return self._bits(loss, self.corpus.train)

    def _bits(self, loss: float, source: texts.Source) -> dict[str, float]:
        per_token = source.bytes_per_token
        return {"bits_per_byte": loss / math.log(2) / per_token} if per_token else {}

    def files(self) -> dict[str, str]:
        if self.data.tokenizer in (None, BYTES):
            return {}
        return {"tokenizer.json": Path(self.data.tokenizer).read_text("utf-8")}

    def beside(self, folder: Path) -> "LMTask":
        copy = folder / "tokenizer.json"
        if self.data.tokenizer in (None, BYTES) or not copy.is_file():
            return self
        data = dataclasses.replace(self.data, tokenizer=str(copy))
        return dataclasses.replace(self, data=data)

    def report(self, model: LM | None, heldout: dict[str, float], run: str) -> str:
        """A sample, what to type next, and last how well held-out text is predicted."""
        lines = []
        tokenizer = self.corpus.tokenizer
        if model is None:
            lines += ["no sample here: the model lies over several processes", ""]
        elif tokenizer is not None:
            prompt = self.corpus.heldout.read(0, min(48, len(self.corpus.heldout)))
            generator = Generator(model)
            context = generator.start([prompt], len(prompt) + 250, seed=0, chunk=len(prompt))
            drawn, _ = generator.generate(context, 250, Choice(temperature=0.8))
            lines += ["sample (held-out text >>> what the model makes of it):", ""]
            lines += [f"{tokenizer.decode(prompt)}>>>{tokenizer.decode(drawn[0])}", ""]
        lines += next_commands(run, "generate", "evaluate", "train")
        if "bits_per_byte" not in heldout:
            return "\n".join([*lines, f"held-out loss: {heldout['loss']:.3f} nats per token"])
        if isinstance(tokenizer, Bytes):
            order2 = order2_bits_per_byte(self.corpus.train, self.corpus.heldout)
            lines.append(f"order-2 model: {order2:.2f}")
        return "\n".join([*lines, f"held-out bits per byte: {heldout['bits_per_byte']:.2f}"])
