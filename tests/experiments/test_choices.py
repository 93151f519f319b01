"""Multiple choice: scores are those of each choice by itself; lines that are wrong are named."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from scanax.experiments import choices, evaluate
from scanax.experiments.loading import load
from support import published, untrained
from support.compare import close

QUESTIONS = [
    {"question": "def add(", "choices": ["first", "a, b", "x"], "answer": 1},
    {"question": "an ", "choices": ["apple", "a"], "answer": 0},  # " a" is one token, " " another
    {"question": "x = 1\n" * 9, "choices": ["def f(x):", "= 1", "y", "z" * 40], "answer": 3},
    {"question": "b", "choices": ["in", "def", "ad"], "answer": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published model, a run, and questions for them."""
    folder = tmp_path_factory.mktemp("choices")
    published.make(folder / "llama")
    published.make(folder / "bare", tokenizer=False)
    mixed = dataclasses.replace(untrained.SMALL, pattern="gla+swiglu,attention+swiglu")
    untrained.save(folder / "run", mixed)
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return folder


read = nnx.jit(lambda model, tokens: model(tokens)[0])


def alone(loaded, question, choice):
    """The choice's sum of log p in a row of its own, all rows of one length to compile once."""
    tokens = np.asarray(loaded.tokenizer.encode(question + choice), np.int32)
    before = np.asarray(loaded.tokenizer.encode(question), np.int32)
    first = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), None)
    first = min(len(before), len(tokens)) if first is None else first
    padded = np.zeros((1, 100), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(read(loaded.model, padded)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logp[i - 1, tokens[i]] for i in range(first, len(tokens)))


def results(folder, kind, out, *more):
    args = ["--checkpoint", str(folder / kind), "--choices", str(folder / "q.jsonl")]
    assert evaluate.main([*args, "--out", str(out), *more]) == 0
    return json.loads((Path(out) / "evaluation.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "run"])
def test_scores_are_those_of_each_choice_by_itself(kind, folder, tmp_path, capsys):
    found = results(folder, kind, tmp_path / "one")
    assert "lengths" not in found and not (tmp_path / "one" / "loss_by_position.png").exists()
    found, loaded = found["choices"], load(folder / kind)
    capsys.readouterr()
    right = {"by_sum": 0, "by_bytes": 0}
    for asked, one in zip(QUESTIONS, found["each"], strict=True):
        expected = [alone(loaded, asked["question"], choice) for choice in asked["choices"]]
        close(np.array(one["log_likelihoods"]), np.array(expected), 1e-5)
        sizes = [len(choice.encode()) for choice in asked["choices"]]
        assert one["bytes"] == sizes and one["answer"] == asked["answer"]
        assert one["by_sum"] == np.argmax(expected)
        assert one["by_bytes"] == np.argmax(np.array(expected) / sizes)
        for way in right:
            right[way] += one[way] == asked["answer"]
    assert found["questions"] == 4 and found["chance"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 4) / 4)
    for way, count in right.items():
        p = count / 4
        assert found[way]["accuracy"] == p
        assert found[way]["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 3))


def test_the_boundary_is_that_of_the_text(folder):
    """`an ` and `apple` meet inside a token: what the question alone does not begin with counts."""
    loaded = load(folder / "llama")
    asked = choices.read(str(folder / "q.jsonl"))[1]
    rows = choices.encode(asked, loaded, "llama")
    tokenizer = loaded.tokenizer
    assert tokenizer.decode(rows[0].tokens) == "an apple"
    assert [tokenizer.decode(row.tokens[row.first :]) for row in rows] == [" apple", " a"]
    assert [len(row.tokens) for row in rows] == [2 + 1 + 4, 2 + 1]


def test_how_rows_are_batched_changes_nothing(folder):
    """Neither does the padding, nor rows of nothing that fill a batch."""
    loaded = load(folder / "run")
    score = evaluate.scorer(loaded.model, evaluate.mesh.make())
    rows = [
        row
        for asked in choices.read(str(folder / "q.jsonl"))
        for row in choices.encode(asked, loaded, "run")
    ]
    one = choices.log_likelihoods(score, rows, 1, 1)
    for span, room in ((3, 200), (128, 512)):
        close(np.array(choices.log_likelihoods(score, rows, span, room)), np.array(one), 1e-5)


def test_any_mesh_gives_the_same(folder, tmp_path):
    one = results(folder, "llama", tmp_path / "one")["choices"]["each"]
    for flag in ("seq=3", "tensor=2"):
        each = results(folder, "llama", tmp_path / flag, "--mesh", flag)["choices"]["each"]
        for a, b in zip(one, each, strict=True):
            close(np.array(b.pop("log_likelihoods")), np.array(a["log_likelihoods"]), 1e-5)
            assert b.items() <= a.items()


BAD = {
    '{"question": ': "line 2 is not JSON",
    "[1, 2]": "line 2 is no object",
    '{"question": "a", "answer": 0}': "line 2 has no choices",
    '{"choices": []}': "line 2 has no question and no answer",
    '{"question": "", "choices": ["a", "b"], "answer": 0}': 'line 2: question is ""',
    '{"question": "a", "choices": ["a"], "answer": 0}': "line 2: choices is .*two or more",
    '{"question": "a", "choices": ["a", ""], "answer": 0}': 'line 2: choice 1 is ""',
    '{"question": "a", "choices": ["a", 3], "answer": 0}': "line 2: choice 1 is 3",
    '{"question": "a", "choices": ["a", "b"], "answer": 2}': "answer is 2; .* from 0 to 1",
    '{"question": "a", "choices": ["a", "b"], "answer": true}': "answer is true",
    '{"question": "i", "choices": ["x", "n"], "answer": 0}': "choice 1 leaves the question no",
    '{"question": "a", "choices": ["x", "@"], "answer": 0}': "choice 1 has no token of its own",
    "": "q.jsonl has no questions",
}


@pytest.mark.parametrize("line", BAD)
def test_a_wrong_line_is_named_and_nothing_is_written(line, folder, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(QUESTIONS[0]) if line else ''}\n{line}\n")
    args = ["--checkpoint", str(folder / "llama"), "--choices", str(path)]
    assert evaluate.main([*args, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"evaluate: {tmp_path}/.*{BAD[line]}.*", said[-1])
    assert all(one.startswith("warning: ") for one in said[:-1])
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_without_a_tokenizer_it_says_what_to_give(folder, tmp_path, capsys):
    args = ["--checkpoint", str(folder / "bare"), "--choices", str(folder / "q.jsonl")]
    args += ["--out", str(tmp_path / "out")]
    assert evaluate.main(args) == 2
    assert "has no tokenizer.json; to answer questions name one" in capsys.readouterr().err
    assert evaluate.main([*args, "--data.tokenizer", "bytes"]) == 2
    assert "line 1 has token 116, the model 97 tokens" in capsys.readouterr().err
    assert evaluate.main([*args, "--data.tokenizer", str(folder / "llama/tokenizer.json")]) == 0
