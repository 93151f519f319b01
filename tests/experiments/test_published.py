"""The scripts on published directories: what they say, on one device and on any mesh."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from scanax.experiments import evaluate, export, generate, loading
from scanax.experiments.answers import Answers
from scanax.experiments.datasets.tokenizer import Bytes, TokenizerJson
from scanax.models.pretrained import UncheckedWarning, load_pretrained
from support import published, untrained
from support.compare import close

TEXT = "def add(first, second):\n    return first + second\n" * 4
MESHES = ("seq=3", "tensor=2", "fsdp=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    published.make(folder / "llama")
    published.make(folder / "bare", tokenizer=False)
    untrained.save(folder / "run")
    (folder / "text.txt").write_text(TEXT)
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_bytes(b"none")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_the_model_of_load_pretrained(folder):
    loaded = loading.load(folder / "llama")
    assert loaded.step is None and isinstance(loaded.tokenizer, TokenizerJson)
    tokens = jnp.arange(8)[None] * 11
    with pytest.warns(UncheckedWarning):
        expected, _ = load_pretrained(folder / "llama")(tokens)
    close(loaded.model(tokens)[0], expected, 1e-6)
    half = loading.load(folder / "llama", dtype="bfloat16", tokenizer="bytes")
    assert half.model.embedding[...].dtype == "bfloat16" and isinstance(half.tokenizer, Bytes)


def words(folder, kind="llama", more=""):
    return ["--checkpoint", str(folder / kind), *more.format(folder=folder).split()]


def test_text_is_that_of_one_device_on_any_mesh(folder, capsys):
    prompts = ["--prompt", "def add(x", "in", "--tokens", "9"]
    said = {}
    for over in ("", *MESHES):
        assert generate.main([*words(folder), *prompts, "--mesh", over]) == 0
        said[over] = capsys.readouterr().out
    assert "--- 0\ndef add(x" in said[""] and len(set(said.values())) == 1


def test_figures_are_those_of_one_device_on_any_mesh(folder, tmp_path, monkeypatch, capsys):
    """And lie in a folder here: nothing is written beside published weights."""
    monkeypatch.chdir(tmp_path)
    before, found = contents(folder), {}
    common = "--data.paths {folder}/text.txt --length 6 --lengths 1 2"
    assert evaluate.main(words(folder, more=common)) == 0
    assert sorted(os.listdir("evaluations/llama")) == ["evaluation.json", "loss_by_position.png"]
    found[""] = json.loads((tmp_path / "evaluations/llama/evaluation.json").read_text())
    for over in MESHES:
        more = f"{common} --mesh {over} --out {over} --no-plot"
        assert evaluate.main(words(folder, more=more)) == 0
        found[over] = json.loads((tmp_path / over / "evaluation.json").read_text())
        assert found[over].pop("text") == found[""]["text"]
    expected = found[""]
    assert expected["step"] is None and expected["training_length"] is None
    assert [one["length"] for one in expected["lengths"]] == [6, 12]
    tokens = published.words().encode(TEXT).ids
    assert expected["lengths"][0]["tokens"] == len(tokens) - 1
    for over in MESHES:
        close(found[over]["lengths"], expected["lengths"], 1e-5)
    assert contents(folder) == before


def test_a_length_of_a_run_is_asked_for(folder, tmp_path):
    more = "--data.paths {folder}/text.txt --length 6 --lengths 1 --no-plot --out "
    assert evaluate.main([*words(folder, "run", more), str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["training_length"], found["lengths"][0]["length"]) == (8, 6)


def test_a_state_goes_on_and_knows_its_weights(folder, tmp_path, capsys):
    common = ["--prompt", "def add", "--temperature", "0", "--tokens"]
    assert generate.main([*words(folder), *common, "8"]) == 0
    whole = capsys.readouterr().out
    state = ["--save-state", str(tmp_path / "s"), "--context", "40"]
    assert generate.main([*words(folder), *common, "3", *state]) == 0
    first = capsys.readouterr().out
    more = ["--load-state", str(tmp_path / "s"), "--temperature", "0", "--tokens", "5"]
    assert generate.main([*words(folder), *more]) == 0
    assert first[:-1] + capsys.readouterr().out == whole
    assert generate.main([*words(folder, more="--dtype bfloat16"), *more]) == 2
    assert "with another dtype of this model, or of another" in capsys.readouterr().err


BAD = {
    "--checkpoint {folder}/llama --step 3": "step=3: {folder}/llama is a published checkpoint",
    "--checkpoint {folder}/run --dtype bfloat16": "dtype=bfloat16 is for published checkpoints",
    "--checkpoint {folder}/weights": "{folder}/weights has no config.json",
    "--checkpoint {folder}/broken": "{folder}/broken/config.json is not JSON",
    "--checkpoint {folder}/none": "{folder}/none: no such directory",
    "--checkpoint broken/typo": "broken/typo: no such directory",
    "--checkpoint {folder}/bare": "{folder}/bare has no tokenizer.json.* \\(bytes, if",
    "--checkpoint {folder}/llama --mesh tensor=3": "tensor=3",
}


@pytest.mark.parametrize("flag", BAD)
def test_what_is_wrong_is_one_line(flag, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before, more = contents(folder), flag.format(folder=folder).split()
    for script, args in (
        (generate, ["--prompt", "a"]),
        (evaluate, ["--data.paths", "text.txt", "--lengths", "1", "--length", "8"]),
    ):
        assert script.main([*more, *args]) == 2
        *notes, said = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"{script.__name__[19:]}: .*{BAD[flag].format(folder=folder)}.*", said)
        assert all(note.startswith("warning: ") for note in notes)
    assert contents(folder) == before


def test_published_weights_bring_no_text(folder, capsys):
    assert evaluate.main(words(folder)) == 2
    assert "which holds no text; name some with --data.paths" in capsys.readouterr().err


def test_results_of_before_are_kept(folder, tmp_path, monkeypatch, capsys):
    """Of the same weights read alike; another directory of the same name needs its own place."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "def add", "choices": ["(first", ", second"], "answer": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    path, asked = tmp_path / "evaluations/llama/evaluation.json", ["--choices", "q.jsonl"]
    text = "--data.paths {folder}/text.txt --length 6 --lengths 1 --no-plot"
    assert evaluate.main(words(folder, more=text)) == 0
    assert evaluate.main([*words(folder), *asked]) == 0
    assert {"text", "lengths", "choices"} <= json.loads(path.read_text()).keys()
    whole = path.read_bytes()
    published.make(tmp_path / "other" / "llama")
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", "other/llama", *asked]) == 2
    said = capsys.readouterr()
    assert f"holds results of {folder}/llama; name another" in said.err and not said.out
    assert path.read_bytes() == whole
    assert evaluate.main([*words(folder), *asked, "--dtype", "bfloat16"]) == 0
    assert "lengths" not in json.loads(path.read_text())


def test_tasks_without_a_tokenizer_say_which_flag_names_one(folder):
    said = "bare has no tokenizer.json, and tasks are given as text; name one with --data.tokenizer"
    with pytest.raises(ValueError, match=said):
        Answers(folder / "bare")


def test_published_weights_are_exported_again(folder, tmp_path, capsys):
    assert export.main([*words(folder), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{folder}/llama as llama: {tmp_path}/out\n"


def test_an_export_is_the_run(folder, tmp_path, capsys):
    """Of bytes too: a tokenizer.json of them is written."""
    from tokenizers import Tokenizer

    model = untrained.SMALL.__class__(
        **vars(untrained.SMALL) | {"pattern": "attention+swiglu", "norm_eps": 1e-6}
    )
    untrained.save(tmp_path / "run", model)
    out, args = tmp_path / "out", ["--checkpoint", str(tmp_path / "run"), "--out"]
    assert export.main([*args, str(out), "--step", "1"]) == 0
    assert sorted(os.listdir(out)) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    tokenizer, text = Tokenizer.from_file(str(out / "tokenizer.json")), "na\u00efve\n \U0001f642 x"
    assert tokenizer.encode(text).ids == list(text.encode()) and tokenizer.decode(range(97)) == str(
        bytes(range(97)), "utf-8"
    )
    ours, theirs = loading.load(tmp_path / "run", 1), loading.load(out)
    tokens = jnp.arange(16)[None]
    assert np.array_equal(ours.model(tokens)[0], theirs.model(tokens)[0])
    capsys.readouterr()
    for wrong, why in {
        str(out): "exists and is not empty",
        f"{tmp_path}/new --family nobody": "family='nobody' is not one of llama",
        f"{tmp_path}/new --step 7": "no checkpoint of step 7",
        f"{tmp_path}/new --like {folder}/weights": "weights has no config.json",
        f"{tmp_path}/new --checkpoint {folder}/run --family llama": "no layout has words for this",
    }.items():
        assert export.main([*args, *wrong.split()]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(f"export: .*{re.escape(why)}.*\n", said), said
    assert not (tmp_path / "new").exists()
