"""How good a trained model is: of text the loss, perplexity, bits per byte, by position and length.

A run of another task (images, series, recall) is measured as that task says, with its pictures.

python -m scanax.experiments.evaluate --checkpoint runs/stdlib
python -m scanax.experiments.evaluate --checkpoint runs/stdlib --data.paths my_project/
python -m scanax.experiments.evaluate --checkpoint published/llama --choices questions.jsonl
python -m scanax.experiments.evaluate --checkpoint runs/stdlib --tasks lambada_openai,piqa
python -m scanax.experiments.evaluate --checkpoint runs/recall-mqar
"""

import os
import sys

from scanax.experiments import starting

starting.begin(__name__)

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from scanax.experiments import choices, examining, flags, harness, memory
from scanax.experiments.datasets import text as texts
from scanax.experiments.loading import Loaded, find, load, parse_step, published
from scanax.experiments.plots import losses
from scanax.experiments.sampling import AXES
from scanax.experiments.scoring import Score, measure, scorer
from scanax.experiments.tasks.lm import LMTask
from scanax.sharding import mesh


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure how good a trained model is: at text, or at the task that it was trained for."""

    checkpoint: str
    """Directory of a training run, or of a published checkpoint, or a Hub id."""
    step: str | None = None
    """The step of a run whose checkpoint to use: a number or `best`; the latest if None."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a published checkpoint's weights and computation; float32 if None. A run has its own."""
    data: texts.DataConfig = dataclasses.field(default_factory=lambda: texts.DataConfig(paths=()))
    """The text, all of it; without --data.paths, what was held out when the model was trained."""
    choices: str | None = None
    """A JSONL file of multiple-choice questions to answer, by the likelihood of each choice: rows
    {"question": "...", "choices": ["...", ...], "answer": 0}. Text is then measured only if
    --data.paths is given."""
    length: int | None = None
    """Tokens that --lengths multiply; if None the training length, 512 for published ones."""
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    """Sequence lengths, in multiples of --length."""
    tokens: int = 200_000
    """Tokens to measure at each length, spread over the text; 0: all of it."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness (extra `eval`), as piqa,arc_*: names, groups or patterns. Text
    is then measured only if --data.paths is given."""
    task_path: str | None = None
    """Directory of more tasks: YAML files of lm-evaluation-harness."""
    shots: int | None = None
    """Examples before each question; if None, as many as each task says."""
    limit: int | None = None
    """The first questions of each task only; all if None."""
    out: str | None = None
    """Directory for evaluation.json and loss_by_position.png; if None the run's own, for published
    checkpoints evaluations/NAME here."""
    plot: bool = True
    """Draw loss_by_position.png (package matplotlib, extra `train`)."""
    mesh: str = ""
    """Devices by axis, as data=2,seq=4: data, expert and fsdp (rows; fsdp also the parameters),
    seq (time), tensor (heads and features). If empty, one device."""
    emulate_devices: int = 0
    """Make this many devices of the CPU, to try a mesh on; 0: use the devices there are."""

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths}; multiples of at least 1 are needed")
        for name in ("tokens", "emulate_devices"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 0")
        for name, least in (("task_path", None), ("shots", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and not self.tasks:
                raise ValueError(f"{name}={value} is for --tasks, and none are given")
            if value is not None and least is not None and value < least:
                raise ValueError(f"{name}={value}; it must be at least {least}")
        if self.data.heldout:
            raise ValueError("--data.heldout is for training; all of --data.paths is measured")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length={self.length}; it must be at least 1")
        bare = texts.DataConfig(
            paths=(), tokenizer=self.data.tokenizer if self.choices or self.tasks else None
        )
        if not self.data.paths and self.data != bare:
            raise ValueError("--data flags describe --data.paths, and none are given")
        if self.out is not None and Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"out={self.out!r} is not a directory")
        if self.choices == "":
            raise ValueError("choices='' names no file")
        if not reads_text(self):
            for name in ("lengths", "tokens", *(() if self.tasks else ("length",))):
                if (value := getattr(self, name)) != getattr(EvaluateConfig, name):
                    raise ValueError(f"{name}={value} is for text; name some with --data.paths")
        parse_step(self.step)


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong, nothing written. 1: the memory is too small, or
    the results cannot be written."""
    about = "Measure how good a trained model is: at text, or at the task it was trained for."
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(EvaluateConfig, None, args, "evaluate", about)
        results = evaluate(config)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        less = "smaller --lengths, --dtype bfloat16 (of published weights) or a --mesh"
        print(f"evaluate: {memory.short(error, less)}", file=sys.stderr)
        return 1
    try:
        save(config, results)
    except (ValueError, OSError) as error:
        print(f"evaluate: the results cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure what is asked for, and print; what evaluation.json holds."""
    questions = [] if config.choices is None else choices.read(config.choices)
    if reads_text(config) and not config.data.paths and published(config.checkpoint):
        raise ValueError(
            f"{config.checkpoint} is a published checkpoint, which holds no text; name some with "
            "--data.paths"
        )
    if config.plot and reads_text(config):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError(
                "the package matplotlib is missing: pip install 'scanax[train]', or give --no-plot"
            ) from None
    tasks = harness.find(config.tasks, config.task_path, config.shots) if config.tasks else None
    mesh.emulate(config.emulate_devices)
    over = mesh.only(mesh.make(config.mesh), *AXES)
    if not isinstance(find(config.checkpoint, parse_step(config.step)).config.task, LMTask):
        return of_task(config, over)
    own: dict[str, Any] = {"dtype": config.dtype, "tokenizer": config.data.tokenizer}
    loaded = load(config.checkpoint, parse_step(config.step), over, **own)
    place(config, loaded.step)
    score, task = scorer(loaded.model, over), loaded.config.task
    # as many tokens at once as a batch of training has, where a row is no longer than that
    room = task.rows * task.length
    results: dict[str, Any] = {"checkpoint": which(config), "step": loaded.step} | own
    # before the text is measured: it finds out what the tasks need and the model lacks
    answers = harness.model_class()(loaded, over=over, length=config.length) if tasks else None
    if reads_text(config):
        results |= by_length(config, loaded, score, over, room)
    if config.choices is not None:
        given = questions, loaded, config.checkpoint, over.shape["seq"], room
        results["choices"] = {"file": config.choices} | choices.answer(score, *given)
    if tasks:
        print(f"{named(config, loaded.step)} on {config.tasks}", flush=True)
        results["tasks"] = harness.measure(tasks, answers, config.limit)
    return results


def of_task(config: EvaluateConfig, over: Mesh) -> dict[str, Any]:
    """Measure a run of a task that is not text, with pictures beside evaluation.json."""
    about = ("checkpoint", "step", "out", "plot", "mesh", "emulate_devices")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in about and value != default(field):
            raise ValueError(f"{field.name}={value}: {config.checkpoint} is not a model of text")
    loaded = load(config.checkpoint, parse_step(config.step), over, kind=object)
    folder = place(config, loaded.step)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{named(config, loaded.step)} on its held-out data")
    about = {"checkpoint": which(config), "step": loaded.step}
    return about | examining.examine(loaded, over, folder if config.plot else None)


def default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def reads_text(config: EvaluateConfig) -> bool:
    return bool(config.data.paths) or not (config.choices or config.tasks)


def by_length(
    config: EvaluateConfig, loaded: Loaded, score: Score, over: Mesh, room: int
) -> dict[str, Any]:
    """Measure the text at every length, `room` tokens at once."""
    source, training = text(config, loaded), loaded.config.task.length
    lengths = [times * (config.length or training) for times in config.lengths]
    with jax.set_mesh(over):
        for length in lengths:
            mesh.over_time(length)
    print(f"{named(config, loaded.step)} on {source.name}, {len(source):,} tokens")
    results: dict[str, Any] = {"text": source.name}
    results |= {"training_length": None if loaded.step is None else training, "lengths": []}
    for length in lengths:
        rows = max(1, room // length)
        result = measure(score, source, rows, length, config.tokens)
        if not results["lengths"]:
            print("".join(f"{name.replace('_', ' '):>16}" for name in result if name in FORMATS))
        print("".join(f"{result[k]:>16{f}}" for k, f in FORMATS.items() if k in result), flush=True)
        results["lengths"].append(result)
    longest = max(results["lengths"], key=lambda result: result["length"])
    print(f"\nnats per token by tokens of context, at length {longest['length']}:")
    for bucket in longest["by_context"]:
        print(f"{span(bucket):>16}{bucket['nats_per_token']:>16.4f}")
    return results


def named(config: EvaluateConfig, step: int | None) -> str:
    return config.checkpoint if step is None else f"step {step} of {config.checkpoint}"


FORMATS = {"length": "d", "nats_per_token": ".4f", "perplexity": ".2f", "bits_per_byte": ".4f"}
FORMATS |= {"tokens": ",d"}


def text(config: EvaluateConfig, loaded: Loaded) -> texts.Source:
    """What is measured, in the model's tokens."""
    own = loaded.config.task.data
    if not config.data.paths:
        return texts.corpus(**vars(own)).heldout
    given = dataclasses.replace(
        config.data,
        heldout=config.data.paths,  # all of it
        tokenizer=config.data.tokenizer or own.tokenizer,
    )
    if texts.are_arrays(given.paths, given.suffixes):
        for name in ("vocab", "document_end", "token_dtype"):
            if getattr(given, name) is None:
                given = dataclasses.replace(given, **{name: getattr(own, name)})
    elif loaded.tokenizer is None and given.tokenizer is None:
        raise ValueError(
            f"{config.checkpoint} {loaded.without}; to measure text name one with --data.tokenizer "
            "(bytes, if its tokens are bytes)"
        )
    source, vocab = texts.corpus(**vars(given)).heldout, loaded.config.task.model.vocab
    if source.vocab > vocab:
        raise ValueError(f"{source.name} has {source.vocab} tokens, the model {vocab}")
    return source


def span(bucket: dict[str, Any]) -> str:
    first, last = bucket["from"], bucket["to"]
    return str(last) if first == last else f"{first}-{last}"


def which(config: EvaluateConfig) -> str:
    """The checkpoint by its whole path, or its Hub id."""
    path = Path(config.checkpoint).expanduser()
    return str(path.resolve()) if path.exists() else config.checkpoint


def place(config: EvaluateConfig, step: int | None) -> Path:
    """The folder of the results; ValueError if it cannot be made, or holds another's."""
    name, own = Path(which(config)).name, config.out is None
    folder = Path(config.out or (config.checkpoint if step is not None else f"evaluations/{name}"))
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"the results cannot be written to {folder}; name a directory with --out")
    other = earlier(folder).get("checkpoint")
    if own and step is None and other not in (None, which(config)):
        raise ValueError(f"{folder} holds results of {other}; name another directory with --out")
    return folder


def earlier(folder: Path) -> dict[str, Any]:
    """What an evaluation.json that is there says."""
    try:
        found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def save(config: EvaluateConfig, results: dict[str, Any]) -> None:
    """evaluation.json and loss_by_position.png, each whole or not at all.

    What was found earlier of the same weights, read alike, and not measured now, is kept.
    """
    folder = place(config, results["step"])
    folder.mkdir(parents=True, exist_ok=True)
    found, same = earlier(folder), ("checkpoint", "step", "dtype", "tokenizer")
    kept = found if all(found.get(k) == results.get(k) for k in same) else {}
    print()
    write(folder / "evaluation.json", json.dumps(kept | results, indent=1).encode())
    if config.plot and "lengths" in results:
        name = Path(which(config)).name
        name = name if results["step"] is None else f"{name}, step {results['step']}"
        write(folder / "loss_by_position.png", losses.loss_by_position(results, name))


def write(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
