"""Measure claims anew: each writes its figures, its plot, and its part of docs/results.md.

python -m scanax.experiments.reproduce --list
python -m scanax.experiments.reproduce lightning decode
python -m scanax.experiments.reproduce language --jobs 2

Runs that train are kept in runs/results/NAME: when stopped, the same command goes on with them. Two
commands at once would share the cores that each believes its own.
"""

import os
import sys

from scanax.experiments import starting

starting.begin(__name__)

import contextlib
import dataclasses
import datetime
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from scanax.experiments import files, flags, results, sections, timing, trained
from scanax.experiments.results import Measured, Setting

DOCS = Path(__file__).resolve().parent.parent / "docs"
RUNS = Path("runs/results")


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Measure claims anew."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure; --list says what there is."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the name and the claim of each, and measure nothing."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Everything is measured once with each."""
    jobs: int = 1
    """Runs of `train` at a time, a core each."""
    small: bool = False
    """Sizes that take seconds: to see that all of it runs. The figures mean nothing; give --out."""
    redraw: bool = False
    """Measure nothing: draw the plot and lay out the text anew, from the figures and the sentences
    of before."""
    out: Path | None = None
    """The folder of results.md, whose folder `results` has the figures and plots (docs)."""


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong. 1: stopped, and nothing of before is lost."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(Reproduce, None, args, "reproduce", __doc__ or "")
        if config.show:
            for name in results.names():
                print(f"{name}: {results.find(name).claim}")
            return 0
        check(config)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs that train are told too
        for name in config.names:
            reproduce(name, config)
    except (ValueError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: stopped; the same command goes on with runs that train", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def check(config: Reproduce) -> None:
    """Raise a ValueError that names the first flag that cannot be, or what results.md lacks."""
    if not config.names:
        raise ValueError(f"name what to measure: {', '.join(results.names())}; or --list")
    for name in config.names:
        results.find(name)
        file = figures(config, name)
        if config.redraw and not (file.exists() or file.with_name(f"{file.name}.new").exists()):
            raise ValueError(f"--redraw: there is no {file}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"--seeds {config.seeds}: one or more are needed, each once, from 0 up")
    if not 1 <= config.jobs <= timing.available():
        raise ValueError(
            f"--jobs {config.jobs}: from 1 to the {timing.available()} cores there are"
        )
    if config.small and config.out is None:
        raise ValueError("--small measures nothing: name another place for it with --out DIR")
    folder = config.out or DOCS
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name one with --out DIR")
    sections.updated(text(folder), others(config), results.names())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the package matplotlib is missing: pip install 'scanax[train]'") from None


def text(folder: Path) -> str:
    path = folder / "results.md"
    return path.read_text("utf-8") if path.exists() else ""


def figures(config: Reproduce, name: str) -> Path:
    return (config.out or DOCS) / "results" / f"{name}.json"


def reproduce(name: str, config: Reproduce) -> None:
    """Measure, draw and write one; whatever fails before the end leaves what was there."""
    experiment, file, pictures = results.find(name), figures(config, name), {}
    new = file.with_name(f"{file.name}.new")
    if config.redraw:
        measured = trained.read(new if new.exists() else file)
        measured["claim"] = experiment.claim
    else:
        print(f"{name}: {experiment.claim}", file=sys.stderr, flush=True)
        measured = measure(name, config)
        for label, path in measured.get("pictures", {}).items():
            pictures[label] = f"{name}-{trained.file_name(label)}.png", Path(path).read_bytes()
        measured["pictures"] = {label: copy for label, (copy, _) in pictures.items()}
    file.parent.mkdir(exist_ok=True)
    for copy, content in pictures.values():
        (file.parent / copy).write_bytes(content)
    # a line a row, so that a changed figure is a changed line
    lines = re.sub(r"\n {3,}|\n {2}(?=\])", " ", json.dumps(measured, indent=1))
    new.write_text(lines + "\n", "utf-8")  # if it cannot be drawn, --redraw finds it
    picture = file.with_suffix(".png")
    try:
        experiment.draw(measured, picture.with_name(f"{picture.name}.new"))
    except IndexError:
        raise ValueError(f"{new} lacks columns: measure it anew") from None
    os.replace(picture.with_name(f"{picture.name}.new"), picture)
    os.replace(new, file)
    folder = file.parent.parent
    files.write(
        folder / "results.md", sections.updated(text(folder), others(config), results.names())
    )
    print(f"{name}: {measured['found']}\n{folder / 'results.md'}")


def others(config: Reproduce) -> list[Measured]:
    """The figures of all that was measured."""
    every = [figures(config, name) for name in results.names()]
    return [trained.read(file) for file in every if file.exists()]


def measure(name: str, config: Reproduce) -> Measured:
    """What an experiment finds, and on what, when and by what it was found."""
    experiment = results.find(name)
    kept = config.out / "runs" / name if config.small and config.out else RUNS / name
    with timing.one_core():  # JAX begins its threads here, and experiments time some things
        what = timing.machine(timing.cores(), config.jobs)
    with spending(kept, what) as spent:
        found = experiment.run(Setting(config.seeds, config.small, config.jobs, kept))
    return {
        "name": name,
        "claim": experiment.claim,
        "command": command(name, config),
        "machine": "; ".join(spent["machines"]),
        "seconds": round(spent["seconds"]),
        "date": str(datetime.date.today()),
        "seeds": list(config.seeds),
    } | found


@contextlib.contextmanager
def spending(kept: Path, what: str) -> Iterator[dict[str, Any]]:
    """Seconds and machines of all commands that the kept runs are of, in `spent.json` beside them.

    They are complete once this ends; an error in between counts too.
    """
    file, begun = kept / "spent.json", time.monotonic()
    spent: dict[str, Any] = {"seconds": 0.0, "machines": []}
    if file.exists():
        spent = trained.read(file)
    if what not in spent["machines"]:
        spent["machines"].append(what)
    try:
        yield spent
    finally:
        spent["seconds"] += time.monotonic() - begun
        if kept.exists():  # what keeps no runs is measured anew
            files.write(file, json.dumps(spent))


def command(name: str, config: Reproduce) -> str:
    """What to type for the same figures; --jobs and --out do not change them."""
    seeds = () if config.seeds == Reproduce.seeds else ("--seeds", *map(str, config.seeds))
    small = ("--small", "--out", "DIR") if config.small else ()
    return " ".join(["python -m scanax.experiments.reproduce", name, *seeds, *small])


if __name__ == "__main__":
    sys.exit(main())
