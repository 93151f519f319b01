"""The site builds without a warning, and what the pages name is there: files, headings, flags."""

import contextlib
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
COMMANDS = ("benchmark", "evaluate", "experts", "export", "generate", "plan", "reproduce")
COMMANDS += ("train", "tune")
TASKS = ("stdlib", "recall-mqar", "forecast", "events-hawkes", "digits-sequence")  # own flags each
TASKS += ("vision-digits", "video-bouncing")
FLAG = re.compile(r"(?<![\w=-])--[a-z][\w.-]*\w(?:\.\*)?")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
COMMAND = re.compile(r"scanax\.experiments\.(\w+)|experiments/(\w+)\.py|make (train)\b")


def name_of(path):
    return str(path.relative_to(ROOT))


def test_the_site_has_every_page_notebook_and_docstring(tmp_path):
    """In one test, for one build of half a minute."""
    site = tmp_path / "html"
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    build += ["-d", tmp_path / "doctrees", DOCS, site]
    done = subprocess.run(list(map(str, build)), capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr

    pages = [*PAGES, *NOTEBOOKS, *DOCS.glob("api/*.rst")]
    made = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in pages}
    assert all((site / name).is_file() for name in made)
    index = (site / "index.html").read_text("utf-8")
    linked = re.findall(r'class="toctree-l\d.*?href="([^"#]+)"', index)
    assert made - {"index.html"} <= set(linked)

    kernels, models = (words(site / f"api/{name}.html") for name in ("kernels", "models"))
    assert re.search(r"linear_attention\(\s*q:\s*Float\[Array, .*?B T Gq K", kernels)
    assert "nats per token" in kernels
    assert "Width of the residual stream, in features." in models

    assert len(NOTEBOOKS) >= 4
    for path in NOTEBOOKS:
        page = site / path.relative_to(DOCS).with_suffix(".html")
        assert "cell_output" in page.read_text("utf-8"), f"{path.name} has no stored output"


def words(page):
    return re.sub(r"<[^>]+>", "", page.read_text("utf-8"))


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", path.read_text("utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} is not there"
        if heading:
            assert heading in headings(target), f"{link}: no such heading"


def headings(path):
    """The anchors that a page's headings get."""
    lines = FENCED.sub("", path.read_text("utf-8")).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@cache
def flags(command):
    """The flags that a command's help lists, of every task."""
    presets = [["--preset", task] for task in TASKS] if command == "train" else [[]]
    return {flag for preset in presets for flag in listed(command, preset)}


def listed(command, args):
    module = importlib.import_module(f"scanax.experiments.{command}")
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as done:
        module.main([*args, "--help"])
    assert done.value.code == 0
    lines = [line.strip("│ ") for line in said.getvalue().splitlines()]
    return [flag for line in lines if line.startswith("-") for flag in FLAG.findall(line)]


def known(flag, of):
    return any(each.startswith(flag[:-1]) for each in of) if flag.endswith("*") else flag in of


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_flags_are_those_of_the_command_they_are_shown_for(path):
    text = path.read_text("utf-8")
    shown = "\n".join(FENCED.findall(text)).replace("\\\n", " ").splitlines()
    for line in [*shown, *re.findall(r"`([^`]+)`", FENCED.sub("", text))]:
        for part in re.split(r"(?=python -m |make train)", line.partition("   #")[0]):
            if found := COMMAND.search(part):
                command = next(filter(None, found.groups()))
                for flag in FLAG.findall(part[found.end() :]) if command in COMMANDS else ():
                    assert known(flag, flags(command)), f"{flag} is no flag of {command}: {line}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_flags_that_stand_alone_are_some_commands(path):
    every = {"--only"}.union(*map(flags, COMMANDS))
    for code in re.findall(r"`([^`]+)`", FENCED.sub("", path.read_text("utf-8"))):
        for flag in FLAG.findall(code) if code.startswith("--") else ():
            assert known(flag, every), f"{flag} is no command's"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_examples_print_what_they_say(path):
    assert doctest.testfile(str(path), module_relative=False, encoding="utf-8").failed == 0
