"""Evaluation: its figures are those of a plain computation, document by document."""

import dataclasses
import json
import math
import os
import re
import resource
from typing import Any

import numpy as np
import pytest
from flax import nnx
from scanax.experiments import evaluate
from scanax.experiments.datasets.text import DataConfig
from scanax.experiments.datasets.tokenizer import TokenizerJson
from scanax.experiments.loading import load
from support import untrained
from support.compare import close

pytestmark = pytest.mark.core

TEXTS = {
    "a.txt": "for letter in 'na\u00efve':\n    print(letter)\n",
    "b.txt": "x",
    "c.txt": "def add(first, second):\n    return first + second\n" * 2,
}
LENGTH = 8  # of training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """texts, and runs: of bytes, of a tokenizer whose file is gone, of token arrays."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "texts").mkdir()
    for name, text in TEXTS.items():
        (folder / "texts" / name).write_text(text, "utf-8")
    (folder / "one.txt").write_text("x")
    (folder / "single").mkdir()
    for name in "xyz":
        (folder / "single" / f"{name}.txt").write_text(name)
    np.save(folder / "big.npy", np.array([1, 2, 900, 3] * 9))
    (np.arange(99, dtype=np.uint32) % 7).tofile(folder / "array.bin")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer.save(str(folder / "gone.json"))

    data = DataConfig(paths=(str(folder / "texts"),))
    untrained.save(folder / "bytes", untrained.SMALL, data, length=LENGTH)
    arrays = DataConfig((str(folder / "array.bin"),), token_dtype="uint32", document_end=6)
    arrays = dataclasses.replace(arrays, vocab=200)
    untrained.save(folder / "arrays", untrained.SMALL, arrays, length=LENGTH)
    words = dataclasses.replace(untrained.SMALL, vocab=tokenizer.get_vocab_size())
    data = dataclasses.replace(data, tokenizer=str(folder / "gone.json"))
    untrained.save(folder / "words", words, data, length=LENGTH)
    (folder / "gone.json").unlink()
    return folder


def run(folder, kind, *more):
    """Exit code and evaluation.json."""
    out = folder / f"out of {kind}"
    code = evaluate.main(["--checkpoint", str(folder / kind), "--out", str(out), *more])
    return code, json.loads((out / "evaluation.json").read_text())


def direct(model, documents, length):
    """(tokens of context, nats) of every predicted token: each piece of a document by itself.

    The text is cut every `length` tokens; a piece begins at a cut or with its document.
    """
    read = nnx.jit(lambda model, tokens: model(tokens)[0])
    found, place = [], 0
    for document in documents:
        start = 0
        while start < len(document):
            piece = document[start : start + length - (place + start) % length]
            padded = np.zeros((1, length), np.int32)
            padded[0, : len(piece)] = piece
            logits = np.asarray(read(model, padded), np.float64)[0]
            for i in range(min(len(piece), len(document) - 1 - start)):
                nats = np.log(np.exp(logits[i]).sum()) - logits[i, document[start + i + 1]]
                found.append((i + 1, nats))
            start += len(piece)
        place += len(document)
    return np.array(found).T


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_figures_are_those_of_a_direct_computation(kind, folder, capsys):
    code, results = run(folder, kind, "--data.paths", str(folder / "texts"), "--tokens", "0")
    said = capsys.readouterr()
    assert code == 0 and said.err == ""
    assert [r["length"] for r in results["lengths"]] == [LENGTH * n for n in (1, 2, 4, 8)]
    loaded = load(folder / kind)
    tokenizer: Any = loaded.tokenizer
    documents = [tokenizer.encode(text) for text in TEXTS.values()]
    if kind == "words":
        assert isinstance(tokenizer, TokenizerJson)
        assert max(map(len, documents)) < len(TEXTS["c.txt"])
    for result in results["lengths"]:
        if result["length"] in (LENGTH, 4 * LENGTH):
            context, nats = direct(loaded.model, documents, result["length"])
            check(result, context, nats)
            size = sum(len(tokenizer.decode(d[1:]).encode()) for d in documents)
            close(result["bits_per_byte"], nats.sum() / math.log(2) / size, 1e-5)
        row: Any = re.search(rf"^ *{result['length']} .*$", said.out, re.M)
        row = row[0].split()
        assert float(row[1]) == pytest.approx(result["nats_per_token"], abs=1e-4)
    last = results["lengths"][-1]
    assert [b["to"] for b in last["by_context"]] == [1, 2, 4, 8, 16, 32, 64][
        : len(last["by_context"])
    ]


def check(result, context, nats):
    assert result["tokens"] == len(nats)
    close(result["nats_per_token"], nats.mean(), 1e-5)
    close(result["perplexity"], np.exp(nats.mean()), 1e-4)
    low = 0
    for bucket in result["by_context"]:
        inside = (context >= bucket["from"]) & (context <= bucket["to"])
        assert bucket["from"] > low and bucket["tokens"] == inside.sum() > 0
        close(bucket["nats_per_token"], nats[inside].mean(), 1e-5)
        low = bucket["to"]
    assert sum(bucket["tokens"] for bucket in result["by_context"]) == len(nats)


def test_without_a_text_it_is_what_was_held_out(folder, capsys):
    code, results = run(folder, "words", "--lengths", "1", "--tokens", "0", "--step", "best")
    assert code == 0 and results["step"] == 1 and results["text"].endswith("(held out)")
    tokenizer: Any = load(folder / "words").tokenizer
    heldout = [text[-len(text) // 16 :] for text in TEXTS.values()]
    most = sum(len(tokenizer.encode(text)) for text in heldout)
    assert 2 <= results["lengths"][0]["tokens"] <= most


def test_some_tokens_only_are_spread_over_the_text(folder):
    seen = []

    def score(batch):
        seen.append(batch["tokens"][0])
        return np.zeros(batch["tokens"].shape)

    config = evaluate.EvaluateConfig("", data=DataConfig(paths=(str(folder / "texts"),)))
    source = evaluate.text(config, load(folder / "bytes"))
    result = evaluate.measure(score, source, 2, LENGTH, 33)
    assert len(seen) == 3 and result["tokens"] == 48  # of 160, by batches of 16
    whole = source.read(0, len(source)).tobytes()
    places = [whole.index(row.tobytes()) / len(whole) for row in seen]
    assert places[0] == 0 and places[-1] > 0.25  # row 0 reads the first half


def test_a_token_array_is_measured_without_bits_per_byte(folder, capsys):
    code, results = run(folder, "arrays", "--lengths", "1", "2")
    assert code == 0 and "bits_per_byte" not in results["lengths"][0]
    # of the last twentieth, 4 5 6 0: nothing follows the 0, and a document begins with it
    assert results["lengths"][0]["tokens"] == 2
    code, results = run(
        folder, "arrays", "--data.paths", str(folder / "array.bin"), "--tokens", "0"
    )
    assert code == 0 and results["lengths"][0]["tokens"] == 98 - 14  # as the run's own flags say


def test_results_lie_where_asked_and_whole(folder, tmp_path, capsys):
    args = ["--checkpoint", str(folder / "bytes"), "--lengths", "1", "--tokens", "64"]
    out = tmp_path / "new" / "place"
    assert evaluate.main([*args, "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["evaluation.json", "loss_by_position.png"]
    assert (out / "loss_by_position.png").read_bytes()[:4] == b"\x89PNG"
    assert str(out / "evaluation.json") in capsys.readouterr().out

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    results = json.loads((out / "evaluation.json").read_text())
    config = evaluate.EvaluateConfig(str(folder / "bytes"), out=str(tmp_path / "full"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            evaluate.save(config, results)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "full") == []


BAD = {
    "--lengths 0": "lengths=\\(0,\\)",
    "--tokens -1": "tokens=-1",
    "--step 7": "no checkpoint of step 7; it has: 1, 2",
    "--checkpoint {folder}": "{folder} is no checkpoint directory",
    "--checkpoint {folder}/none": "{folder}/none: no such directory",
    "--data.paths {folder}/none": "{folder}/none: no such file",
    "--data.paths {folder}/one.txt": "one.txt is empty: 1 tokens",
    "--data.paths {folder}/single": "no document has 2 tokens",
    "--data.paths {folder}/texts --data.heldout {folder}/texts": "--data.heldout",
    "--data.suffixes .py": "none are given",
    "--choices q.jsonl --tokens 5": "tokens=5 is for text; name some with --data.paths",
    "--choices q.jsonl --length 5": "length=5 is for text",
    "--tasks piqa --lengths 1": "lengths=\\(1,\\) is for text",
    "--data.paths {folder}/big.npy --data.vocab 1000": "has 1000 tokens, the model 256",
    "--data.paths {folder}/big.npy --data.vocab 256": "token 900 at position 2 is outside",
    "--checkpoint {folder}/arrays --data.paths {folder}/texts": "without a tokenizer; to measure",
    "--out {folder}/one.txt": "one.txt' is not a directory",
    "--out {folder}/one.txt/deep": "one.txt/deep; name a directory with --out",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_wrong_flag_is_one_line_and_nothing_is_written(flag, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    args = ["--checkpoint", str(folder / "bytes"), *flag.format(folder=folder).split()]
    assert evaluate.main(args) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"evaluate: .*{BAD[flag].format(folder=folder)}.*\n", said)
    assert sorted(folder.rglob("*")) == before


def test_a_missing_package_is_named_before_anything_runs(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert evaluate.main(["--checkpoint", str(folder / "bytes")]) == 2
    assert "pip install 'scanax[train]', or give --no-plot" in capsys.readouterr().err
