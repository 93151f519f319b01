"""What lm-evaluation-harness asks of a model: log-likelihoods of texts, and continuations."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, use_abstract_mesh

from ..models import merge
from ..sharding import mesh
from .asking import Asked, understood, windows
from .loading import Loaded, load, parse_step
from .sampling import AXES, Generator, row_keys

CHUNK = 512  # tokens of a row that are read at once where a state goes on
LOGITS = 1 << 25  # that exist at once, unless the model's loss_chunk says otherwise
PIECE = 32  # tokens that are generated before the ends are looked for


class Answers:
    """A trained model, as lm-evaluation-harness asks it (`lm_eval.api.model.LM`).

    A model whose state does not grow reads any text with all that is before it. One with attention
    over the whole document reads `length` tokens at most (None: as many as in training): a context
    loses its beginning, and a text that is scored is read in windows, every token once.
    Where a tokenizer has no token for a text's beginning, a text's first token counts as drawn from
    all tokens alike, and an empty text cannot be continued. Results do not depend on the batch.
    """

    def __init__(
        self,
        checkpoint: str | Path | Loaded,
        step: str | int | None = None,
        length: int | None = None,
        batch_size: int | None = None,
        over: Mesh | None = None,
    ):
        super().__init__()
        over = mesh.only(mesh.make() if over is None else over, *AXES)
        if not isinstance(checkpoint, Loaded):
            checkpoint = load(checkpoint, parse_step(None if step is None else str(step)), over)
        task, self.tokenizer = checkpoint.config.task, cast(Any, checkpoint.tokenizer)
        self.config, self.busy = task.model, False  # busy: what fails is the model, not a task
        if self.tokenizer is None:
            raise ValueError(
                f"{checkpoint.folder} {checkpoint.without}, and tasks are given as text; name one "
                "with --data.tokenizer (bytes, if its tokens are bytes)"
            )
        if self.tokenizer.vocab > self.config.vocab:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab} tokens, the model {self.config.vocab}"
            )
        self.before, self.start, ends = self.tokenizer.marks
        self.ends = ends | ({task.data.document_end} - {None})
        grows = self.config.grows
        self.length = (length or task.length) if grows else None
        self.room = None if grows else self.config.attention.window or 1
        if not isinstance(batch_size or 1, int) or (batch_size or 1) < 1:
            raise ValueError(f"{batch_size=} is not a number of rows")
        parts = math.prod(over.shape[axis] for axis in mesh.ROWS)
        self.rows = -(-(batch_size or task.rows) // parts) * parts
        self.generator = generator = Generator(checkpoint.model, over)
        self.places = mesh.sharding(over, mesh.ROWS, "seq")
        states = None if grows else generator.places.state
        self.read = jax.jit(self._read, donate_argnums=1, out_shardings=(None, None, states))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy generation would write it."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p(text)."""
        return [total for total, _ in self._score([self._pair("", r.args[0]) for r in requests])]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations, each cut before the first of the strings that end it."""
        asked, texts = [self._asked(*request.args) for request in requests], [""] * len(requests)
        if not asked:
            return texts
        # by all requests, so that equal ones draw differently whatever batches they are in
        keys = row_keys([one.prompt for one in asked], seed=0)
        kinds: dict[Any, list[int]] = {}
        for i in sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt)):
            kinds.setdefault((asked[i].how, asked[i].most), []).append(i)
        batches = [some for order in kinds.values() for some in self._batches(order)]
        self.busy = True
        for some in tqdm.tqdm(batches, desc="generation", disable=None):
            full = np.resize(some, self.rows)  # the batch again where it is not full
            found = self._continue([asked[i] for i in full], keys[full])
            for i, text in zip(some, found, strict=False):
                texts[i] = text
        self.busy = False
        return texts

    def _encode(self, text: str) -> list[int]:
        """A text's tokens, after what the tokenizer's own template puts before them."""
        tokens = self.tokenizer.encode(text).tolist()
        there = tuple(tokens[: len(self.before)]) == self.before
        return tokens if there else [*self.before, *tokens]

    def _pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """The tokens of both together, and how many of them are given.

        Space that ends a context belongs to the continuation, as the harness has it; so does a
        token across the border.
        """
        whole, stem = self._encode(context + continuation), context.rstrip()
        given = self._encode(stem) if stem else list(self.before)
        pairs = zip(whole, given, strict=False)
        first = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if first == 0:
            there = tuple(whole[: len(self.start)]) == self.start
            whole, first = whole if there else [*self.start, *whole], len(self.start)
        return np.array(whole, np.int32), first

    def _score(self, texts: list[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """The log-likelihood of each text's tokens from a number on."""
        totals, greedy, spans = np.zeros(len(texts)), np.ones(len(texts), bool), []
        for i, (tokens, first) in enumerate(texts):
            if first == 0 and len(tokens):
                totals[i], greedy[i], first = -math.log(self.config.vocab), False, 1
            spans += [(i, *window) for window in windows(tokens, first, self.length)]
        spans.sort(key=lambda span: -len(span[1]))
        self.busy = True
        for some in tqdm.tqdm(self._batches(spans), desc="log-likelihoods", disable=None):
            nll, hit = self._predicted([tokens for _, tokens, _ in some])
            for row, (i, tokens, first) in enumerate(some):
                scored = slice(first - 1, len(tokens) - 1)
                totals[i] -= nll[row, scored].sum()
                greedy[i] &= hit[row, scored].all()
        self.busy = False
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def _predicted(self, texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Nats of every token after a text's first, and whether it is the likeliest; longest first.

        A state goes on from piece to piece; attention over all of a text reads it at once.
        """
        longest, step, begin = len(texts[0]) - 1, self.length or CHUNK, 0
        state = None if self.room is None else self.generator.blank(self.rows, self.room)
        found = []
        while begin < longest:
            size = self._size(min(step, longest - begin), step)
            arrays = np.zeros((2, self.rows, size), np.int32)
            for row, tokens in enumerate(texts):
                piece = tokens[begin : begin + size + 1]
                for array, part in zip(arrays, (piece[:-1], piece[1:]), strict=True):
                    array[row, : len(part)] = part
            placed = jax.device_put(tuple(arrays), self.places)
            *pair, state = self.read(self.generator.variables, state, *placed)
            found.append([np.asarray(x) for x in pair])
            begin += size
        nll, hit = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return nll.astype(np.float64), hit

    def _read(self, variables, state, tokens, targets):
        with use_abstract_mesh(self.generator.mesh.abstract_mesh):
            model: Any = merge(self.generator.graphdef, *variables)
            x, after, _ = model.hidden(tokens, state)

            def one(step):
                logits, target = model.logits(step[0][:, None])[:, 0], step[1]
                chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
                nll = jax.nn.logsumexp(logits, axis=-1) - chosen
                return nll, jnp.argmax(logits, axis=-1).astype(target.dtype) == target

            steps = (self.config.loss_chunk or LOGITS // self.config.vocab) // self.rows
            found = jax.lax.map(one, (x.swapaxes(0, 1), targets.T), batch_size=max(1, steps))
            return found[0].T, found[1].T, None if state is None else after

    def _asked(self, context: str, options: dict[str, Any]) -> Asked:
        """A request understood; ValueError for an option that would be ignored."""
        how, most, until = understood(options)
        prompt = np.array(self._encode(context) or self.start, np.int32)
        if not len(prompt):
            raise ValueError(
                "a task asks to continue an empty text, and the tokenizer has no token for a "
                "text's beginning"
            )
        if self.length is not None and most >= self.length:
            raise ValueError(f"max_gen_toks={most} leaves no room for a text in {self.length}")
        return Asked(prompt[-(self.length - most) :] if self.length else prompt, how, most, until)

    def _continue(self, asked: list[Asked], keys: np.ndarray) -> list[str]:
        """One continuation each, of one way to draw and one limit."""
        how, most, longest = asked[0].how, asked[0].most, max(len(one.prompt) for one in asked)
        piece = min(PIECE, 1 << (most - 1).bit_length())
        room = self.room or self._size(longest + -(-most // piece) * piece)
        prompts, multiple = [one.prompt for one in asked], self._size(longest)
        context = self.generator.start(prompts, room, 0, CHUNK, multiple)
        context, tokens = context._replace(keys=jnp.asarray(keys)), np.zeros((len(asked), 0), int)
        while True:
            more, context = self.generator.generate(context, piece, how)
            tokens = np.concatenate([tokens, more], axis=1)
            found = [
                self._cut(row[:most], one.until) for row, one in zip(tokens, asked, strict=True)
            ]
            if tokens.shape[1] >= most or all(ended for _, ended in found):
                return [text for text, _ in found]

    def _cut(self, tokens: np.ndarray, until: tuple[str, ...]) -> tuple[str, bool]:
        """The text up to the first end, and whether there is one."""
        last = next((i for i, token in enumerate(tokens.tolist()) if token in self.ends), None)
        text = self.tokenizer.decode(tokens[:last])
        places = [place for place in map(text.find, until) if place >= 0]
        return text[: min(places, default=None)], bool(places) or last is not None

    def _size(self, length: int, most: int | None = None) -> int:
        """A power of 2, so that few shapes are compiled, or the most there is."""
        size = max(16, 1 << (length - 1).bit_length())
        return -(-min(size, most or size) // self.generator.span) * self.generator.span

    def _batches(self, items: list) -> list[list]:
        return [items[i : i + self.rows] for i in range(0, len(items), self.rows)]
