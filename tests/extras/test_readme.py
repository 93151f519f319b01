"""The README's commands, as printed and in its order, in a fresh clone with a fresh environment.

The clone is of what is committed here; it installs from the package index, a minute or two.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ADDRESS = "git clone https://github.com/scanax/scanax"
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # no stranger has these
OURS += ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC", "SCANAX_TILES")
SUITE = "make test"  # left out: it is a step of its own of `.ci/run`
FEW_STEPS = {"make train": 'make train ARGS="--steps 20 --final-batches 2"'}


def blocks(language):
    """The fenced blocks of a language, "" for commands."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each command printed; the first that fails ends it."""
    folder = tmp_path_factory.mktemp("fresh")
    clean = {k: v for k, v in os.environ.items() if k not in OURS}
    assert SUITE in commands() and ADDRESS in commands()
    found = {}
    for command in commands():
        if command == SUITE:
            continue
        run = FEW_STEPS.get(command, command).replace(
            ADDRESS, f"git clone {shlex.quote(str(ROOT))} scanax"
        )
        if command.startswith("cd "):
            folder = folder / command.removeprefix("cd ")
            continue
        done = subprocess.run(
            run, shell=True, cwd=folder, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{run}\n{done.stdout}\n{done.stderr}"
        found[command] = done.stdout
    return folder, found


@pytest.mark.timeout(1800)
def test_the_commands_work_in_their_order(said):
    """And end with what the README says that they end with."""
    _, found = said
    assert "held-out bits per byte" in found["make train"]
    assert "order-2" in found["make train"]
    (evaluated,) = (text for command, text in found.items() if "evaluate.py" in command)
    assert "bits per byte" in evaluated
    (generated,) = (text for command, text in found.items() if "generate.py" in command)
    assert generated.startswith("def ")
    (explained,) = (text for command, text in found.items() if "--help" in command)
    assert "--model.pattern" in explained


@pytest.mark.timeout(600)
def test_its_python_runs_in_that_environment(said):
    folder, _ = said
    (code,) = blocks("python")
    python = folder / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
