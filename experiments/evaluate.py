"""How well a trained model predicts text: loss, perplexity, bits per byte, by position and length.

python -m scanax.experiments.evaluate --checkpoint runs/stdlib
python -m scanax.experiments.evaluate --checkpoint runs/stdlib --data.paths my_project/
python -m scanax.experiments.evaluate --checkpoint published/llama --choices questions.jsonl
python -m scanax.experiments.evaluate --checkpoint runs/stdlib --tasks lambada_openai,piqa
"""

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    sys.path.pop(0)  # this file must not stand before the library `evaluate`

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tqdm
from flax import nnx
from jax.sharding import Mesh, use_abstract_mesh
from scanax.experiments import choices, flags
from scanax.experiments import data as texts
from scanax.experiments.loading import Loaded, load, parse_step, published
from scanax.experiments.sampling import AXES
from scanax.models import LM
from scanax.sharding import mesh


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well a trained model predicts text."""

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
        bare = texts.DataConfig(paths=(), tokenizer=self.data.tokenizer if self.choices else None)
        if not self.data.paths and self.data != bare:
            raise ValueError("--data flags describe --data.paths, and none are given")
        if self.out is not None and Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"out={self.out!r} is not a directory")
        parse_step(self.step)


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong, nothing written. 1: the results cannot be written."""
    about = "Measure how well a trained model predicts text."
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(EvaluateConfig, None, args, "evaluate", about)
        results = evaluate(config)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    try:
        save(config, results)
    except OSError as error:
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
    own = {"dtype": config.dtype, "tokenizer": config.data.tokenizer}
    loaded = load(config.checkpoint, parse_step(config.step), over, **own)
    score, task = scorer(loaded.model, over), loaded.config.task
    # as many tokens at once as a batch of training has, where a row is no longer than that
    room = task.rows * task.length
    results: dict[str, Any] = {"step": loaded.step}
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


def reads_text(config: EvaluateConfig) -> bool:
    return bool(config.data.paths) or not (config.choices or config.tasks)


Score = Callable[[texts.Batch], np.ndarray]


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


def scorer(model: LM, over: Mesh) -> Score:
    """Nats of every target of a batch, whose rows and time lie over the mesh."""
    graphdef, variables = nnx.split(model)
    parts = math.prod(over.shape[axis] for axis in mesh.ROWS)

    @jax.jit
    def nll(variables, tokens, targets, reset):
        with use_abstract_mesh(over.abstract_mesh):
            return nnx.merge(graphdef, variables).nll(tokens, targets, reset=reset)[0]

    def score(batch):
        rows, length = batch["tokens"].shape
        more = -rows % parts  # rows of nothing, so that they divide
        place = mesh.sharding(over, mesh.ROWS, None if length == 1 else "seq")
        arrays = (np.pad(batch[name], ((0, more), (0, 0))) for name in READ)
        found = nll(variables, *jax.device_put(tuple(arrays), place))
        return np.asarray(found, np.float64)[:rows]

    return score


READ = ("tokens", "targets", "reset")


def measure(score: Score, source: texts.Source, rows: int, length: int, tokens: int) -> dict:
    """Means over rows of `length` tokens that start fresh, and by how many tokens are read before.

    About `tokens` of them, in batches spread over the text; 0: all.
    """
    available = texts.evaluation_steps(source, batch=rows, length=length)
    count = min(-(-tokens // (rows * length)) or available, available)
    # bucket 0 has targets after 1 token, bucket b those after more than 2^(b-1), up to 2^b
    total, weight = np.zeros((2, length.bit_length() + 1))
    for i in tqdm.tqdm(range(count), desc=f"length {length}", leave=False, disable=None):
        batch = texts.evaluation(source, i * available // count, batch=rows, length=length)
        nll, counted = score(batch), batch["weights"] > 0
        place = np.arange(length)
        place = place - np.maximum.accumulate(np.where(batch["reset"], place, 0), axis=1)
        bucket = np.frexp(place)[1][counted]
        total += np.bincount(bucket, nll[counted], total.size)
        weight += np.bincount(bucket, minlength=total.size)
    if not weight.sum():
        raise ValueError(f"{source.name}: no document has 2 tokens, so there is nothing to predict")
    mean = float(total.sum() / weight.sum())
    result = {"length": length, "nats_per_token": mean, "perplexity": float(np.exp(mean))}
    if source.bytes_per_token:
        result["bits_per_byte"] = mean / math.log(2) / source.bytes_per_token
    curve = [
        {
            "from": 2**b // 2 + 1,
            "to": min(2**b, length),
            "nats_per_token": total[b] / weight[b],
            "tokens": int(weight[b]),
        }
        for b in np.flatnonzero(weight).tolist()
    ]
    return result | {"tokens": int(weight.sum()), "by_context": curve}


def span(bucket: dict[str, Any]) -> str:
    first, last = bucket["from"], bucket["to"]
    return str(last) if first == last else f"{first}-{last}"


def save(config: EvaluateConfig, results: dict[str, Any]) -> None:
    """evaluation.json and loss_by_position.png, each whole or not at all."""
    name = Path(config.checkpoint).resolve().name
    bare = results["step"] is None
    own = Path("evaluations", name) if bare else Path(config.checkpoint)
    folder = own if config.out is None else Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    print()
    write(folder / "evaluation.json", json.dumps(results, indent=1).encode())
    if config.plot and "lengths" in results:
        name = name if bare else f"{name}, step {results['step']}"
        write(folder / "loss_by_position.png", curves(results, name))


def write(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    print(path)


def curves(results: dict[str, Any], title: str) -> bytes:
    """A PNG of the loss by tokens of context, a curve a length."""
    from matplotlib.figure import Figure  # an extra, and no global state as with pyplot

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    shades = np.linspace(0.75, 0, len(results["lengths"]))  # of one colour: lengths have an order
    for result, shade in zip(results["lengths"], shades, strict=True):
        points = [
            (math.sqrt(b["from"] * b["to"]), b["nats_per_token"]) for b in result["by_context"]
        ]
        color = (shade, shade + 0.4 * (1 - shade), 0.7 + 0.3 * shade)
        label = f"length {result['length']:,}"
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    about = "tokens of the document read so far"
    if results["training_length"] is not None:
        axes.axvline(results["training_length"], color="0.6", linewidth=0.8, linestyle="--")
        about += " (dashed: training length)"
    axes.set_xlabel(about)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")  # where losses end up least
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


if __name__ == "__main__":
    sys.exit(main())
