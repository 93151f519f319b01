"""Runs of the trainer: resuming changes nothing, flags say what is wrong with them."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from scanax.experiments import checkpoint, config, flags, metrics, train
from scanax.experiments.optimizer import OptimizerConfig, learning_rate
from scanax.experiments.tasks.lm import LMTask
from support.runs import STREAM, args

pytestmark = pytest.mark.core


def arrays(run, step):
    """Every array of a checkpoint, by name."""
    about = checkpoint.manifest(run, step)["arrays"]
    target = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in about.items()}
    return jax.device_get(checkpoint.restore(run, target, step).state)


def losses(run):
    return [(row["step"], row["loss"]) for row in metrics.read(Path(run))]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A streaming run of 20 steps at one go: (its folder, what it printed, compiled steps)."""
    folder, said = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    run = train.prepare(flags.train(args(texts, folder, STREAM)))
    with contextlib.redirect_stdout(said):
        train.train(run)
    return folder, said.getvalue(), run.program.step._cache_size()


def test_ten_steps_and_ten_more_are_twenty(texts, whole, tmp_path, monkeypatch):
    asked, real = [], LMTask.batches

    def batches(task, seed, step, rows):
        if step == 9 and 9 not in asked:
            signal.raise_signal(signal.SIGTERM)
        asked.append(step)
        return real(task, seed, step, rows)

    monkeypatch.setattr(LMTask, "batches", batches)
    assert train.main(args(texts, tmp_path / "r", STREAM)) == 0
    assert checkpoint.steps(tmp_path / "r") == [10]
    with (tmp_path / "r" / "metrics.jsonl").open("a") as log:  # as if killed two steps later
        log.write('{"step": 11, "loss": 9.0}\n{"step": 12, "lo')
    run = train.prepare(flags.train(["--resume", "--run", str(tmp_path / "r")]))
    assert run.step == 10
    train.train(run)

    assert asked == [0, *range(10), 0, *range(10, 20)]  # both look at one batch before they start
    assert losses(tmp_path / "r") == losses(whole[0])
    assert [step for step, _ in losses(whole[0])] == list(range(1, 21))
    ours, theirs = arrays(tmp_path / "r", 20), arrays(whole[0], 20)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert {name.split(".")[0] for name in ours} == {"params", "optimizer", "stream", "skipped"}
    assert whole[2] == run.program.step._cache_size() == 1


def test_what_a_run_leaves_and_says(whole):
    folder, said, _ = whole
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any((folder / "tensorboard").iterdir())
    *before, order2, last = said.strip().splitlines()
    assert re.fullmatch(r"order-2 model: \d\.\d\d", order2)
    assert re.fullmatch(r"held-out bits per byte: \d\.\d\d", last)
    for command in ("generate", "evaluate", "train"):
        assert any(f"scanax.experiments.{command} " in line for line in before)
    saved = checkpoint.load_config(folder)
    assert saved == json.loads((folder / "config.json").read_text())
    assert json.loads(json.dumps(config.to_json(config.from_json(saved)))) == saved
    assert checkpoint.manifest(folder, 20)["metric"] == metrics.read(folder)[-1]["heldout_loss"]


def test_an_existing_run_is_not_overwritten(texts, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    assert train.main(args(texts, whole[0])) == 2
    assert f"{whole[0]} exists: --resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


def test_runs_without_a_name_are_numbered_and_the_last_is_resumed(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stdlib", "stdlib-2"):
        assert flags.train([]).folder == Path("runs", name)
        Path("runs", name).mkdir(parents=True)
        assert flags.train([]).folder == Path("runs", name)  # it is empty
        (Path("runs", name) / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"preset='mamba-130m', but runs/stdlib is of 'stdlib'"):
        flags.train(["--resume", "--run", "runs/stdlib", "--preset", "mamba-130m"])
    resumed = flags.train(["--resume", "--steps", "30"])
    assert (resumed.folder, resumed.steps, resumed.task.length) == (Path("runs/stdlib-2"), 30, 12)


def test_the_rate_warms_up_and_falls_to_its_end():
    config = OptimizerConfig(rate=2.0, warmup=4, final=0.1)
    rates = [learning_rate(config, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.5) and rates[100] == pytest.approx(0.2)
    assert max(rates) == rates[3] and all(a > b for a, b in itertools.pairwise(rates[3:]))
    fixed = dataclasses.replace(config, decay_steps=50)
    assert learning_rate(fixed, 50, 0.0) == learning_rate(fixed, 90, 0.9) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("minutes", "steps", "part"), [(None, 20, 0.25), (2.0, 20, 0.5), (60.0, 20, 0.25)]
)
def test_steps_and_minutes_whichever_is_further_on(minutes, steps, part):
    settings = config.TrainConfig(task=LMTask(), steps=steps, minutes=minutes)
    assert train.progress(settings, 5, 60.0) == part


@pytest.mark.parametrize("name", flags.files() + list(flags.SIZES))
def test_every_preset_can_be_overridden_and_read_back(name):
    made = flags.train(["--preset", name, "--model.norm-eps", "0.25", "--steps", "7"])
    assert (made.steps, made.minutes, made.task.model.norm_eps) == (7, None, 0.25)
    original = flags.preset(name).task.model
    assert dataclasses.replace(made.task.model, norm_eps=original.norm_eps) == original
    assert config.from_json(json.loads(json.dumps(config.to_json(made)))) == made


BAD = {
    "--model.widht 3": "--model.widht",
    "--steps ten": "--steps",
    "--steps 0": "steps=0",
    "--length 0": "length=0",
    "--model.pattern gla+swiglu,wkv": "'wkv'.*is not one of gla, retention",
    "--model.dtype float16": "'float16'.*'bfloat16'",
    "--data.paths /no/such/text": "/no/such/text",
    "--preset mamba-131m": "'mamba-131m' is not one of",
    "--resume --run {run}": "{run}",
    "--stream-state --model.pattern attention": "without a window",
    "--rows 3 --accumulate 2": "3 rows do not divide into accumulate=2",
    "--model.vocab 255": "model.vocab=255.*256",
    "--optimizer.beta2 1": "beta2=1",
    "--model.gla.heads 7": "7 heads",
    "--wandb x": "scanax\\[wandb\\]",
    "--mesh data=2,time=4": "'time=4' is not AXIS=N.*seq, tensor",
    "--mesh seq=0": "'seq=0' is not a number of devices",
    "--mesh data=16": "has 16 devices, and there are 8; --emulate-devices 16, in Python",
    "--mesh seq=5": "length=12 does not divide over seq=5 devices; 10 or 15 would",
    "--mesh data=4 --accumulate 4": "rows=1 does not divide over data=4 devices; 4 would",
    "--mesh data=4 --accumulate 2 --stream-state": "rows=2 does not divide over data=4 devices",
    "--mesh tensor=8": "does not divide over tensor=8",
    "--step 3": "--step 3 goes with --resume",
    "--seed 2147483648": "seed=2147483648.*2147483648",
    "--final-batches -1": "final_batches=-1",
    "--model.width 0": "width=0",
    "--model.mamba.state 0": "mamba.state=0",
    "--model.init-std nan": "init_std=nan",
    "--data.document-end 0": "document_end=0 is for token arrays",
    "--run /proc/self/none": "/proc/self/none",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_wrong_flag_is_one_line_and_nothing_is_written(
    flag, texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    assert train.main([*args(texts, run), *flag.format(run=run).split()]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"train: .*{BAD[flag].format(run=run)}.*\n", said.err) and not said.out
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_its_tokenizer(texts, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models

    words = ["alpha", "beta", "gamma", "delta", ",", " ", "\n"]
    named = {word: number for number, word in enumerate(words)}
    Tokenizer(models.BPE(named, [], ignore_merges=True)).save(str(tmp_path / "t.json"))
    more = ["--steps", "1", "--data.tokenizer", str(tmp_path / "t.json")]
    assert train.main([*args(texts, tmp_path / "r"), *more]) == 0
    (tmp_path / "t.json").unlink()
    resumed = flags.train(["--resume", "--run", str(tmp_path / "r"), "--steps", "2"])
    assert resumed.task.data.tokenizer == str(tmp_path / "r" / "tokenizer.json")
    assert train.prepare(resumed).config.task.corpus.vocab == len(words)


def test_weights_and_biases_goes_on_with_the_run(texts, tmp_path, capsys, monkeypatch):
    begun, logged = [], []

    class Module:
        def init(**given):
            if given["project"] == "refused":
                raise RuntimeError("no api key")
            begun.append(given)
            return types.SimpleNamespace(log=log, finish=lambda: logged.append("end"))

    def log(row, step):
        logged.append(step)
        if step == 3:
            raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Module)
    for step, more in enumerate(("", "--resume --run {run}"), 1):
        line = f"{more} --wandb texts --steps {step}".format(run=tmp_path / "r").split()
        assert train.main([*args(texts, tmp_path / "r"), *line]) == 0
    assert begun[0]["id"] == begun[1]["id"] != "r" == begun[0]["name"]
    assert logged == [1, "end", 2, "end"]
    for _ in range(2):  # the folder is still free
        assert train.main([*args(texts, tmp_path / "s"), "--wandb", "refused"]) == 1
        said = capsys.readouterr().err
        assert said.endswith("train: Weights & Biases did not start: no api key\n")
    assert train.main([*args(texts, tmp_path / "t"), "--wandb", "texts", "--steps", "4"]) == 0
    assert "train: goes on without Weights & Biases: no network\n" in capsys.readouterr().err
    assert logged[4:] == [1, 2, 3] and checkpoint.latest(tmp_path / "t") == 4
