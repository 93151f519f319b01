"""Multiple choice by likelihood: which of a question's choices a model finds likeliest as its end.

A question is a row of a JSONL file: {"question": "...", "choices": ["...", "..."], "answer": 0}.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from .loading import Loaded

SHORTEST = 32  # rows are padded to this, or to a power of two


class Question(NamedTuple):
    where: str
    """The file and the line, for what is said of it."""
    line: int
    question: str
    choices: list[str]
    answer: int


class Row(NamedTuple):
    """A question's tokens with one of its choices; those from `first` on are the choice's."""

    tokens: np.ndarray
    first: int


def read(path: str) -> list[Question]:
    """The questions of a file. ValueError that names the line of what is wrong."""
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    found = [_question(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} has no questions")
    return found


def _question(path: str, line: int, text: str) -> Question:
    where = f"{path} line {line}"
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object with question, choices and answer")
    if missing := [name for name in ("question", "choices", "answer") if name not in row]:
        raise ValueError(f"{where} has no {' and no '.join(missing)}")
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str) or not question:
        raise ValueError(f"{where}: question is {_shown(question)}; it must be a text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{where}: choices is {_shown(choices)}; it must be a list of two or more")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"{where}: choice {i} is {_shown(choice)}; it must be a text")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: answer is {_shown(answer)}; it must be a number from 0 to {len(choices) - 1}"
        )
    return Question(where, line, question, choices, answer)


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def answer(
    score: Callable[[dict[str, np.ndarray]], np.ndarray],
    questions: list[Question],
    loaded: Loaded,
    name: str,
    span: int,
    room: int,
) -> dict[str, Any]:
    """Answer all, and print how many are right; what the results file holds.

    score: nats of every target of a batch, of a length that `span` divides and of about `room`
    tokens. A choice's score is the sum of log p of its tokens, or that per byte of its text.
    """
    rows = [row for question in questions for row in encode(question, loaded, name)]
    sums = iter(log_likelihoods(score, rows, span, room))
    each = []
    for asked in questions:
        found = [next(sums) for _ in asked.choices]
        sizes = [len(choice.encode("utf-8")) for choice in asked.choices]
        by_bytes = [value / size for value, size in zip(found, sizes, strict=True)]
        picked = {"by_sum": int(np.argmax(found)), "by_bytes": int(np.argmax(by_bytes))}
        about = {"line": asked.line, "answer": asked.answer} | picked
        each.append(about | {"log_likelihoods": found, "bytes": sizes})
    results: dict[str, Any] = {"questions": len(questions)}
    results["chance"] = float(np.mean([1 / len(asked.choices) for asked in questions]))
    for way in ("by_sum", "by_bytes"):
        right = float(np.mean([one[way] == one["answer"] for one in each]))
        many = len(each) - 1  # of a sample's mean
        error = math.sqrt(right * (1 - right) / many) if many else None
        results[way] = {"accuracy": right, "standard_error": error}
    _tell(results)
    return results | {"each": each}


def _tell(results: dict[str, Any]) -> None:
    print(f"\n{results['questions']:,} questions, by chance {results['chance']:.1%} would be right")
    print(f"{'by log p of':>16}{'accuracy':>16}{'standard error':>16}")
    for way, label in (("by_sum", "the choice"), ("by_bytes", "each byte")):
        error = results[way]["standard_error"]
        shown = "" if error is None else f"{error:.1%}"
        print(f"{label:>16}{results[way]['accuracy']:>16.1%}{shown:>16}")


def encode(asked: Question, loaded: Loaded, name: str) -> list[Row]:
    """Each choice after its question, tokenised together: the boundary is the text's own.

    Tokens that the question alone begins with too are context. ValueError if that is none, or if
    nothing is left of a choice, or the model does not know a token.
    """
    tokenizer, vocab = loaded.tokenizer, loaded.config.task.model.vocab
    if tokenizer is None:
        raise ValueError(
            f"{name} {loaded.without}; to answer questions name one with --data.tokenizer (bytes, "
            "if its tokens are bytes)"
        )
    alone, rows = np.asarray(tokenizer.encode(asked.question)), []
    for i, choice in enumerate(asked.choices):
        tokens = np.asarray(tokenizer.encode(asked.question + choice), np.int32)
        many = min(len(alone), len(tokens))
        same = np.cumprod(tokens[:many] == alone[:many])
        first = int(same.sum())
        if len(tokens) and tokens.max() >= vocab:
            raise ValueError(f"{asked.where} has token {tokens.max()}, the model {vocab} tokens")
        if not first:
            raise ValueError(f"{asked.where}: choice {i} leaves the question no token of its own")
        if first == len(tokens):
            raise ValueError(f"{asked.where}: choice {i} has no token of its own")
        rows.append(Row(tokens, first))
    return rows


def log_likelihoods(
    score: Callable[[dict[str, np.ndarray]], np.ndarray], rows: list[Row], span: int, room: int
) -> list[float]:
    """The sum of log p of each row's tokens from `first` on.

    Rows are padded on the right, where no token sees it, and those of a like length go together.
    """
    lengths = [_padded(len(row.tokens) - 1, span) for row in rows]
    sums = [0.0] * len(rows)
    with tqdm.tqdm(total=len(rows), desc="choices", leave=False, disable=None) as bar:
        for length in sorted(set(lengths), reverse=True):  # memory that is short is so at once
            here = [i for i, padded in enumerate(lengths) if padded == length]
            size = min(max(1, room // length), len(here))
            for begin in range(0, len(here), size):
                chosen = here[begin : begin + size]
                nats = score(_batch([rows[i] for i in chosen], size, length))
                for i, found in zip(chosen, nats, strict=False):
                    sums[i] = -float(found[rows[i].first - 1 : len(rows[i].tokens) - 1].sum())
                bar.update(len(chosen))
    return sums


def _padded(length: int, span: int) -> int:
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return -(-power // span) * span


def _batch(rows: list[Row], size: int, length: int) -> dict[str, np.ndarray]:
    tokens, targets = np.zeros((2, size, length), np.int32)
    for i, row in enumerate(rows):
        many = len(row.tokens) - 1
        tokens[i, :many], targets[i, :many] = row.tokens[:-1], row.tokens[1:]
    return {"tokens": tokens, "targets": targets, "reset": np.zeros((size, length), bool)}
