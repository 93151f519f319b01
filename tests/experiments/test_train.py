"""The trainer: resuming changes nothing, parts add up, what is not finite is skipped."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.experiments import checkpoint, config, flags, metrics, train
from scanax.experiments.optimizer import OptimizerConfig, learning_rate
from scanax.experiments.saving import SaveError, Saver
from scanax.experiments.step import build
from scanax.experiments.tasks import Task
from scanax.experiments.tasks.lm import LMTask
from support.compare import close

SMALL = "--model.pattern gla+swiglu --model.width 16 --model.depth 2 --model.gla.heads 2 "
SMALL += "--model.attention.heads 2 --rows 4 --length 12 "
SMALL += "--heldout-batches 2 --final-batches 3 --log-every 1 "
STREAM = "--model.pattern gla+swiglu,attention+gelu --model.attention.window 5 "
STREAM += "--stream-state --accumulate 2 "


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three documents of words, long enough for a few dozen steps."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name in "abc":
        words = rng.choice(["alpha", "beta", "gamma\n", "delta,"], 400)
        (folder / f"{name}.txt").write_text(" ".join(words))
    return folder


def args(texts, run, more=""):
    return f"--data.paths {texts} --run {run} --steps 20 {SMALL}{more}".split()


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

    def batches(task, seed, step):
        if step == 9 and 9 not in asked:
            signal.raise_signal(signal.SIGTERM)
        asked.append(step)
        return real(task, seed, step)

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
        (Path("runs", name) / "config.json").write_bytes((whole[0] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"preset='mamba-130m', but runs/stdlib is of 'stdlib'"):
        flags.train(["--resume", "--run", "runs/stdlib", "--preset", "mamba-130m"])
    resumed = flags.train(["--resume", "--steps", "30"])
    assert (resumed.folder, resumed.steps, resumed.task.length) == (Path("runs/stdlib-2"), 30, 12)


@dataclasses.dataclass(frozen=True)
class Root(Task):
    """A task of one weight: the loss is the root of weight times input, plus a running sum."""

    unit: ClassVar[str] = "numbers"

    def build(self, rngs):
        model = nnx.Module()
        model.kernel = nnx.Param(jnp.ones((3,), jnp.float32))
        return model

    def init_state(self, model):
        return jnp.zeros((4,), jnp.float32)

    def decayed(self, params):
        return jax.tree.map(lambda _: True, params)

    def loss(self, model, batch, state):
        x, weights = batch["x"], batch["weights"]
        root = jnp.sqrt(x @ model.kernel[...]) + state
        weight = weights.sum()
        loss = (root * weights).sum() / jnp.where(weight, weight, 1)
        return loss, (state + x.sum(1), {"loss": loss, "weight": weight})


def test_a_split_batch_gives_the_unsplit_update():
    """Also where a part has less weight than another, or none."""
    rng = np.random.default_rng(1)
    batch = {"x": rng.uniform(1, 2, (4, 3)), "weights": np.array([1.0, 1.0, 0.0, 0.5])}
    batch = jax.tree.map(lambda x: x.astype(np.float32), batch)
    results = []
    for parts in (1, 2, 4):
        program, state = build(Root(), OptimizerConfig(), 0, parts)
        for _ in range(3):
            state, numbers = program.step(state, program.rest, batch, np.float32(0.1))
        state["stream"] = state["stream"].reshape(4)
        results.append((state, numbers))
    for other in results[1:]:
        close(other, results[0], 1e-6)
    assert results[0][1]["weight"] == 2.5


@pytest.mark.parametrize("bad", [np.nan, 0.0], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    """nan makes the loss nan; at 0 the root is finite and its slope is not."""
    program, state = build(Root(), OptimizerConfig(), 0, 1)
    good = {"x": np.ones((4, 3), np.float32), "weights": np.ones(4, np.float32)}
    state, _ = program.step(state, program.rest, good, np.float32(0.1))
    before = jax.device_get(state)
    x = good["x"].copy()
    x[2] = bad
    state, numbers = program.step(state, program.rest, good | {"x": x}, np.float32(0.1))
    assert np.isfinite(numbers["loss"]) == (bad == 0)
    after = jax.device_get(state)
    assert after.pop("skipped") == before.pop("skipped") + 1 == numbers["skipped"]
    assert jax.tree.all(jax.tree.map(np.array_equal, after, before))
    state, numbers = program.step(state, program.rest, good, np.float32(0.1))
    assert numbers["skipped"] == 1 and not np.array_equal(state["stream"], before["stream"])


def test_streaming_reads_the_text_as_one_long_sequence(texts):
    """Two steps' losses, the state carried, are the loss of one step of twice the length."""
    task = flags.train(args(texts, "none", STREAM)).task
    model, long = task.build(nnx.Rngs(0)), dataclasses.replace(task, length=24)
    # where a document begins inside a row
    at = next(i for i in range(1000) if long.batches(3, i)["reset"][:, 1:].any())
    loss = nnx.jit(lambda model, batch, state: task.loss(model, batch, state)[1])
    whole, numbers = loss(model, long.batches(3, at), task.init_state(model))
    state, total, weight = task.init_state(model), 0.0, 0.0
    for step in (2 * at, 2 * at + 1):
        state, part = loss(model, task.batches(3, step), state)
        total += part["loss"] * part["weight"]
        weight += part["weight"]
    assert weight == numbers["weight"] < 4 * 24  # a document's last target does not count
    close((state, total / weight), (whole, numbers["loss"]), 1e-5)


def test_bfloat16_computes_with_float32_masters(texts):
    task = flags.train(args(texts, "none", "--model.dtype bfloat16")).task
    program, state = build(task, OptimizerConfig(), 0, 1)
    rate = np.float32(0)
    after, numbers = jax.eval_shape(program.step, state, program.rest, task.batches(0, 0), rate)
    kinds = {x.dtype for x in jax.tree.leaves((after["params"], after["optimizer"][1].mu))}
    assert kinds == {jnp.dtype(jnp.float32)} and numbers["loss"].dtype == jnp.float32
    text = program.step.lower(state, program.rest, task.batches(0, 0), rate).as_text()
    assert re.search(r"dot_general.*bf16", text)


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


@pytest.mark.parametrize("name", flags.files() + list(flags.PRESETS))
def test_every_preset_can_be_overridden_and_read_back(name):
    made = flags.train(["--preset", name, "--model.init-std", "0.25", "--steps", "7"])
    assert (made.steps, made.minutes, made.task.model.init_std) == (7, None, 0.25)
    original = flags.preset(name).task.model
    assert dataclasses.replace(made.task.model, init_std=original.init_std) == original
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


def test_a_save_that_fails_ends_the_run_with_1(texts, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise SaveError("the disk is full")

    monkeypatch.setattr(Saver, "save", fail)
    assert train.main(args(texts, tmp_path / "r", STREAM)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "train: the disk is full"


def test_a_full_disk_under_the_log_ends_the_run_with_1(texts, tmp_path):
    """Under a limit on the size of files; a writer of another thread would hang or lose rows."""
    more = "--log-every 1 --validate-every 0 --save-every 0 --steps 1000000"
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    limited += "from scanax.experiments import train; sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, *args(texts, tmp_path / "run"), *more.split()]
    uncached = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=uncached, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"train: the log of {tmp_path / 'run'} cannot be written: File too large"
    assert "Traceback" not in done.stderr
    events = list((tmp_path / "run" / "tensorboard").iterdir())
    assert [path.stat().st_size for path in events] == [20_000]


@pytest.mark.parametrize("moment", ["check", "evaluate"])
def test_told_to_stop_before_the_first_step_or_in_the_last_evaluation(
    moment, texts, tmp_path, capsys, monkeypatch
):
    real = getattr(LMTask, moment)

    def told(task, *given, **more):
        if moment == "check" or more.get("final"):
            signal.raise_signal(signal.SIGTERM)
        return real(task, *given, **more)

    monkeypatch.setattr(LMTask, moment, told)
    assert train.main([*args(texts, tmp_path / "r"), "--steps", "2"]) == 0
    step = 0 if moment == "check" else 2
    assert f"stopped; step {step} is saved" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "r") == [step]


def test_a_run_that_was_killed_before_its_config_begins_again(texts, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json.new").write_text("{")
    assert train.prepare(flags.train(args(texts, tmp_path / "r"))).step == 0
    (tmp_path / "r" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="r exists"):
        train.prepare(flags.train(args(texts, tmp_path / "r")))


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
            return types.SimpleNamespace(
                log=lambda row, step: logged.append(step), finish=lambda: logged.append("end")
            )

    monkeypatch.setitem(sys.modules, "wandb", Module)
    for step, more in enumerate(("", "--resume --run {run}"), 1):
        line = f"{more} --wandb texts --steps {step}".format(run=tmp_path / "r").split()
        assert train.main([*args(texts, tmp_path / "r"), *line]) == 0
    assert begun[0]["id"] == begun[1]["id"] != "r" == begun[0]["name"]
    assert logged == [1, "end", 2, "end"]
    assert train.main([*args(texts, tmp_path / "s"), "--wandb", "refused"]) == 1
    assert capsys.readouterr().err.endswith("train: Weights & Biases did not start: no api key\n")


def test_a_trace_that_was_not_made_is_told(texts, tmp_path, capsys):
    more = ["--profile", "--steps", "3", "--no-tensorboard"]
    assert train.main([*args(texts, tmp_path / "r"), *more]) == 0
    assert "profile: no trace" in capsys.readouterr().err
    assert not (tmp_path / "r" / "tensorboard").exists()


def test_sigterm_saves_and_exits_0(texts, tmp_path):
    run, script = tmp_path / "run", Path(train.__file__)
    command = [sys.executable, str(script), *args(texts, run, STREAM), "--steps", "1000000"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=script.parent)
        try:
            while not metrics.read(run):
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
    step = checkpoint.latest(run)
    assert metrics.read(run)[-1]["step"] == step
    assert f"step {step} is saved" in (tmp_path / "said").read_text()
    assert not os.path.exists(run / "loss.png")
