"""How a run ends: at a signal, at a full disk, killed before it began."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scanax.experiments import checkpoint, flags, metrics, train
from scanax.experiments.saving import SaveError, Saver
from scanax.experiments.tasks.lm import LMTask
from support.runs import STREAM, args


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


def test_a_validation_that_was_cut_off_is_made_up_for(texts, tmp_path, capsys, monkeypatch):
    real, told = LMTask.evaluate, []

    def evaluate(*given, **more):
        if not told:
            told.append(signal.raise_signal(signal.SIGTERM))
        return real(*given, **more)

    monkeypatch.setattr(LMTask, "evaluate", evaluate)
    assert train.main([*args(texts, tmp_path / "r"), "--steps", "3"]) == 0
    assert "stopped; step 3 is saved" in capsys.readouterr().err
    assert checkpoint.best(tmp_path / "r") is None
    assert train.main(["--resume", "--run", str(tmp_path / "r")]) == 0
    assert checkpoint.best(tmp_path / "r") == 3
    measured = checkpoint.manifest(tmp_path / "r", 3)["metric"]
    assert metrics.read(tmp_path / "r")[-1]["heldout_loss"] == measured


def test_tensorboard_shows_each_step_once_after_a_resume(texts, tmp_path):
    from tensorboardX.proto import event_pb2

    for more in (["--steps", "2"], ["--resume", "--run", str(tmp_path / "r"), "--steps", "3"]):
        assert train.main([*args(texts, tmp_path / "r"), *more]) == 0
    seen = []
    for path in sorted((tmp_path / "r" / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: its length in 8 bytes, 4 of check, the event, 4 of check
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log"):
                seen.append(("start", event.step))
            seen += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    losses = [(row["step"], row["loss"]) for row in metrics.read(tmp_path / "r")]
    assert [(e[1], pytest.approx(e[2])) for e in seen if e[0] == "loss"] == losses
    assert [e for e in seen if e[0] == "start"] == [("start", 1), ("start", 3)]


def test_a_trace_is_written(texts, tmp_path):
    assert train.main([*args(texts, tmp_path / "r"), "--profile", "--steps", "7"]) == 0
    assert list((tmp_path / "r" / "profile").rglob("*.xplane.pb"))


def test_a_run_that_was_killed_before_its_config_begins_again(texts, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json.new").write_text("{")
    assert train.prepare(flags.train(args(texts, tmp_path / "r"))).step == 0
    (tmp_path / "r" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="r exists"):
        train.prepare(flags.train(args(texts, tmp_path / "r")))


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
