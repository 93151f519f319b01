"""One run over two processes is the run of one, whatever happens to either of them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from scanax.experiments import checkpoint, hosts, metrics, train
from scanax.experiments.launcher import Hosts
from scanax.sharding import mesh
from support.compare import close
from support.runs import STREAM, args

SECONDS = 500  # more than any process here may take, on a slow machine beside other tests


@contextlib.contextmanager
def together(folder, flags, script=None):
    """Two processes of one run on this machine, two devices each; `said()` is what one printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = []
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": "1"}
    try:
        for index in range(2):
            where = f"--hosts.coordinator 127.0.0.1:{port} --hosts.count 2 --hosts.index {index}"
            where = [*where.split(), "--hosts.silence", "10"]
            command = [sys.executable, str(script or train.__file__), *flags, *where]
            out, err = (folder / f"{index}.{kind}" for kind in ("out", "err"))
            with out.open("w") as out_file, err.open("w") as err_file:
                process = subprocess.Popen(
                    command, stdout=out_file, stderr=err_file, env=environment
                )
            started.append(process)
            process.said = lambda out=out, err=err: (out.read_text(), err.read_text())
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def until(true, processes):
    """Wait for something that running processes do."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, [process.said() for process in processes]
        assert all(process.poll() is None for process in processes), [p.said() for p in processes]
        time.sleep(0.05)


def done(processes, codes=(0, 0)):
    found = tuple(process.wait(SECONDS) for process in processes)
    assert found == codes, [process.said() for process in processes]


GLOO = r"\[Gloo\]|Rank|is connected to|peer ranks|Expected number of connected|[\s\d.:]|is"


def silent(text):
    """Whether there is nothing but gloo's lines, which come on both streams and torn."""
    return not re.sub(GLOO, "", text)


def errors(process):
    """The lines of the trainer; JAX's C++ says its own at an abort."""
    return [line for line in process.said()[1].splitlines() if line.startswith("train: ")]


def losses(folder):
    return np.array([row["loss"] for row in metrics.read(folder)])


STREAMING = "--stream-state --accumulate 2 "
SIX = ["--steps", "6", "--no-plot"]


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    """The run of one process and one device."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main([*args(texts, folder, STREAMING), *SIX]) == 0
    return folder


@pytest.mark.parametrize("over", ["data=2,seq=2", "seq=4"])  # in a process; from one to the other
def test_two_processes_train_as_one(over, alone, texts, tmp_path):
    run = tmp_path / "r"
    more = [*SIX, "--mesh", over, "--validate-every", "3"]
    with together(tmp_path / "said", [*args(texts, run, STREAMING), *more]) as both:
        done(both)
        (said, _), (nothing, log) = (process.said() for process in both)
    close(losses(run), losses(alone), 1e-5)
    assert "no sample here" in said and "held-out bits per byte" in said
    assert silent(nothing) and silent(log)
    assert [row["step"] for row in metrics.read(run)] == list(range(1, 7))
    assert {path.name for path in run.iterdir()} == {
        *("3", "6", "config.json", "final.json", "metrics.jsonl", "tensorboard")
    }
    # and one process goes on from there with the same arrays
    one = ["--resume", "--run", str(run), "--mesh", "", "--steps", "7"]
    resumed = train.prepare(train.flags.train(one))
    assert resumed.config.hosts == Hosts() and resumed.step == 6
    flat = resumed.config.task.by_layer(resumed.state["params"])
    target = {"params": {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}}
    saved = checkpoint.restore(run, target, 6, part=True).state["params"]
    for name, x in flat.items():
        np.testing.assert_array_equal(x, saved[name])
    train.train(resumed)
    assert checkpoint.latest(run) == 7


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_and_both_resume(killed, texts, tmp_path):
    # the rate of a step does not depend on how many there are
    run, over = tmp_path / "r", ["--mesh", "data=4", "--no-plot", "--optimizer.decay-steps", "50"]
    begin = [*args(texts, run), *over, "--save-every", "2", "--steps", "100000"]
    with together(tmp_path / "said", begin) as both:
        until(lambda: checkpoint.steps(run), both)
        both[killed].kill()
        left = both[1 - killed]
        assert left.wait(60) == 1, left.said()
        out, err = left.said()
        (line,) = errors(left)
    assert silent(out) and "Traceback" not in err
    assert line.startswith(f"train: process {1 - killed} of 2: ")
    assert "another process end" in line
    at = checkpoint.latest(run)
    resume = ["--resume", "--run", str(run), "--steps", str(at + 3)]
    with together(tmp_path / "said", resume) as both:
        done(both)
    whole = tmp_path / "whole"
    assert train.main([*args(texts, whole), *over, "--steps", str(at + 3)]) == 0
    assert len(losses(run)) == at + 3
    close(losses(run), losses(whole), 1e-5)


def test_a_signal_to_one_stops_both_at_the_same_step(texts, tmp_path):
    run = tmp_path / "r"
    begin = [*args(texts, run), "--mesh", "data=4", "--steps", "100000"]
    with together(tmp_path / "said", begin) as both:
        until(lambda: len(metrics.read(run)) > 2, both)
        both[1].send_signal(signal.SIGTERM)
        done(both)
        (_, err), (_, other) = (process.said() for process in both)
    (step,) = checkpoint.steps(run)
    assert f"stopped; step {step} is saved" in err and "stopped" not in other
    assert metrics.read(run)[-1]["step"] == step


def test_what_one_process_finds_wrong_ends_both(texts, tmp_path):
    """Its own flags, and a checkpoint that only one of them could not write."""
    run = tmp_path / "r"
    with together(tmp_path / "said", [*args(texts, run), "--mesh", "data=2"]) as both:
        done(both, (2, 2))
        said = [errors(process) for process in both]
    assert all(len(lines) == 1 and "leaves process 1 without any" in lines[0] for lines in said)
    assert not run.exists()

    script = tmp_path / "failing.py"
    script.write_text(
        "import sys\n"
        "from scanax.experiments import hosts, saving, train\n"
        "real = saving.Saver.save\n"
        "def save(saver, step, *given, **more):\n"
        "    if step == 4 and not hosts.first():\n"
        "        saver.wait()  # as it does itself: the save before this one is complete\n"
        "        raise saving.SaveError('the disk is full')\n"
        "    real(saver, step, *given, **more)\n"
        "saving.Saver.save = save\n"
        "sys.exit(train.main())\n"
    )
    flags = [*args(texts, run), "--mesh", "data=4", "--save-every", "2"]
    with together(tmp_path / "said", flags, script=script) as both:
        done(both, (1, 1))
        said = [errors(process) for process in both]
    assert said[1] == ["train: process 1 of 2: the disk is full"]
    assert said[0] == ["train: process 0 of 2: process 1 ended: the disk is full"]
    assert checkpoint.steps(run) == [2]


@pytest.mark.parametrize("index", [0, 1])
def test_others_that_do_not_come_are_one_line(index, texts, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"127.0.0.1:{free.getsockname()[1]}"
    more = f"--hosts.coordinator {at} --hosts.count 2 --hosts.index {index} --hosts.timeout 2"
    command = [sys.executable, train.__file__, *args(texts, tmp_path / "r"), *more.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 2 and not ended.stdout
    line = f"train: the processes did not all come to {at} in hosts.timeout=2 seconds\n"
    assert ended.stderr == line
    assert not (tmp_path / "r").exists()


WRONG = {
    "--hosts.count 2": "hosts.count=2 .* without hosts.coordinator",
    "--hosts.index 1": "hosts.index=1 without hosts.coordinator",
    "--hosts.coordinator there": "'there' is not HOST:PORT",
    "--hosts.coordinator there:1": "needs hosts.count and hosts.index",
    "--hosts.coordinator there:1 --hosts.count 2": "needs hosts.count and hosts.index",
    "--hosts.coordinator there:1 --hosts.count 2 --hosts.index 2": "index=2 is not one of hosts.c",
    "--hosts.coordinator there:1 --hosts.count 0": "hosts.count=0; it must be at least 1",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_one_line(flags, texts, tmp_path, capsys):
    assert train.main([*args(texts, tmp_path / "r"), *flags.split()]) == 2
    assert re.fullmatch(f"train: .*{WRONG[flags]}.*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line(texts, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        where = f"--hosts.coordinator {at} --hosts.count 2 --hosts.index 0".split()
        assert train.main([*args(texts, tmp_path / "r"), *where]) == 2
    assert re.fullmatch(rf"train: hosts.coordinator='{at}': .*in use.*\n", capsys.readouterr().err)


SLURM = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
THERE = Hosts("there:1", 4, 3)
RANK_3 = {"coordinator_address": "there:1", "num_processes": 4, "process_id": 3}
DETECTED = {
    "none": (Hosts(), {}, None),
    "flags": (THERE, {}, RANK_3 | {"cluster_detection_method": "deactivate"}),
    "asked": (Hosts(detect=True), {}, {}),
    "slurm": (Hosts(), SLURM, {}),
    "one task": (Hosts(), SLURM | {"SLURM_NTASKS": "1"}, None),
    "a batch script": (Hosts(), {"SLURM_NTASKS": "4"}, None),
    "slurm, at a port": (Hosts("there:1"), SLURM, RANK_3),
    "mpi": (Hosts(), MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://1.1.1.1:1"}, {}),
    "mpi 5, at a port": (Hosts("there:1"), MPI, RANK_3),
    "mpi, one": (Hosts(), {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    "tpu": (Hosts(), {"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    "tpu, one host": (Hosts(), {"TPU_WORKER_HOSTNAMES": "a"}, None),
    "tpu, slices": (Hosts(), {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
    "alone": (Hosts(count=1), SLURM, None),
}


@pytest.mark.parametrize("name", DETECTED)
def test_who_the_others_are(name, texts, tmp_path, monkeypatch):
    """And `initialize` is called with that, or not at all."""
    flags, environment, expected = DETECTED[name]
    for variable in (*SLURM, *MPI, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    called, waits = [], {"initialization_timeout": 300, "heartbeat_timeout_seconds": 60}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: called.append(given))
    monkeypatch.setattr(hosts, "_on_abort", lambda *_: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    hosts.start(flags)
    assert called == ([] if expected is None else [expected | waits])


def test_an_open_mpi_that_does_not_say_where(texts, tmp_path, monkeypatch, capsys):
    for variable, value in MPI.items():
        monkeypatch.setenv(variable, value)
    assert train.main(args(texts, tmp_path / "r")) == 2
    assert "give --hosts.coordinator" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["", STREAM])
def test_a_batch_is_made_by_rows_and_cut_in_time(stream, texts):
    task = train.flags.train(args(texts, "r", stream)).task
    whole, asked = task.batches(3, 5), []

    def make(rows):
        asked.append(rows)
        return task.batches(3, 5, rows)

    over = mesh.make("data=4,seq=2")
    placed = mesh.spread(mesh.sharding(over, mesh.ROWS, "seq"), task.rows, make)
    assert asked == [slice(b, b + 1) for b in range(4)]
    for name, x in placed.items():
        np.testing.assert_array_equal(x, whole[name])
        assert {s.data.shape for s in x.addressable_shards} == {(1, task.length // 2)}


def test_one_process_asks_for_its_rows(texts, tmp_path):
    """The trainer itself, on two processes: rows of training, of validation and of a stream."""
    script, run = tmp_path / "asking.py", tmp_path / "r"
    script.write_text(
        "import json, sys\n"
        "from scanax.experiments import train\n"
        "from scanax.experiments.datasets import sources, text as data\n"
        "from scanax.experiments.tasks import lm\n"
        "asked, named = [], {}\n"
        "for name in ('streams', 'evaluation'):\n"
        "    def noted(*given, rows=data.ALL, real=getattr(data, name), name=name, **more):\n"
        "        asked.append([name, rows.start, rows.stop])\n"
        "        return real(*given, rows=rows, **more)\n"
        "    setattr(data, name, noted)\n"
        "code = train.main()\n"
        "print(json.dumps(asked))\n"
        "sys.exit(code)\n"
    )
    flags = [*args(texts, run, "--stream-state "), *SIX, "--mesh", "data=4"]
    with together(tmp_path / "said", flags, script=script) as both:
        done(both)
        asked = [json.loads(re.findall(r"\[\[.*\]\]", process.said()[0])[-1]) for process in both]
    for index, (probe, *calls) in enumerate(asked):
        assert probe == ["streams", 0, 1]  # a row, for its shape
        for name in ("streams", "evaluation"):
            rows = {(first, last) for kind, first, last in calls if kind == name}
            assert rows == {(2 * index, 2 * index + 1), (2 * index + 1, 2 * index + 2)}
