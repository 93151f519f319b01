"""A trained run as a directory that other libraries load: config.json, safetensors, tokenizer.json.

python -m scanax.experiments.export --checkpoint runs/mine --out published/mine
python -m scanax.experiments.export --checkpoint runs/tuned --out published/tuned --like original/
"""

import sys

from scanax.experiments import starting

starting.begin(__name__)

import dataclasses
import json
from pathlib import Path

from scanax.experiments import flags
from scanax.experiments.datasets.tokenizer import Bytes, TokenizerJson
from scanax.experiments.loading import load, parse_step
from scanax.models.pretrained import save_pretrained


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a trained run as a published checkpoint."""

    checkpoint: str
    """Directory of a training run."""
    out: str
    """The directory to write, which must not be there or be empty."""
    step: str | None = None
    """The step whose checkpoint to use: a number or `best`; the latest if None."""
    like: str | None = None
    """A published directory, as the one that the run began from, whose further options and
    tokenizer files are kept."""
    family: str | None = None
    """What kind of model to write, as config.json calls it (llama, mamba); if None that of --like,
    or the first that has words for the model."""

    def __post_init__(self):
        parse_step(self.step)


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong, or the directory cannot be written."""
    about = "Write a trained run as a published checkpoint."
    try:
        args = sys.argv[1:] if args is None else args
        export(flags.parse(ExportConfig, None, args, "export", about))
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


def export(config: ExportConfig) -> None:
    loaded, out = load(config.checkpoint, parse_step(config.step)), Path(config.out).expanduser()
    save_pretrained(loaded.model, out, family=config.family, like=config.like)
    written = None
    if isinstance(loaded.tokenizer, TokenizerJson):
        written = Path(loaded.tokenizer.path).read_text("utf-8")
    elif isinstance(loaded.tokenizer, Bytes):
        written = loaded.tokenizer.json()
    if written is not None:
        (out / "tokenizer.json").write_text(written, "utf-8")
        if not (out / "tokenizer_config.json").exists():  # what transformers asks for
            about = {"tokenizer_class": "PreTrainedTokenizerFast"}
            (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    kind = json.loads((out / "config.json").read_text("utf-8")).get("model_type")
    step = "" if loaded.step is None else f"step {loaded.step} of "
    print(f"{step}{config.checkpoint} as {kind}: {out}")


if __name__ == "__main__":
    sys.exit(main())
