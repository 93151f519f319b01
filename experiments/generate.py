"""Continue prompts with a trained model.

python -m scanax.experiments.generate --checkpoint runs/stdlib --prompt "def " --tokens 400
python -m scanax.experiments.generate --checkpoint published/llama --prompt "Once" --dtype bfloat16
"""

import sys

from scanax.experiments import starting

starting.begin(__name__)

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from scanax.experiments import flags, memory, saved_state
from scanax.experiments.loading import Loaded, load, parse_step
from scanax.experiments.sampling import AXES, Choice, Context, Generator, row_keys
from scanax.sharding import mesh


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model."""

    checkpoint: str
    """Directory of a training run, or of a published checkpoint, or a Hub id."""
    step: str | None = None
    """The step of a run whose checkpoint to use: a number or `best`; the latest if None."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of a published checkpoint's weights and computation; float32 if None. A run has its own."""
    tokenizer: str | None = None
    """Path of a tokenizer.json, or `bytes`; if None, what lies beside the weights."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, of any lengths; each gets what it would get alone."""
    prompt_file: str | None = None
    """A text file to continue, instead of --prompt."""
    tokens: int = 256
    """Tokens to generate for each prompt."""
    temperature: float = 0.8
    """Spread of the draw: 0 takes the likeliest token, 1 the model's own probabilities."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens, likeliest first, that together have at least this probability
    (of what temperature and top-k leave)."""
    seed: int | None = None
    """Decides the draws. If None: 0, or for a loaded state the one that it was saved with."""
    prefill_chunk: int = 512
    """Tokens of a prompt that are read at a time: memory grows with it, the result is the same."""
    context: int | None = None
    """Tokens that the caches of attention without a window have room for, prompt and later ones
    together; what this call needs if None. Other mixers' states do not grow."""
    save_state: str | None = None
    """A file to write the state to after the last token, to go on from later."""
    load_state: str | None = None
    """A file of --save-state to go on from; --prompt is then read after it, and may be left out."""
    mesh: str = ""
    """Devices by axis, as data=2,seq=4: data, expert and fsdp (prompts; fsdp also the
    parameters), seq (tokens of prompts and attention's caches), tensor (heads and features). If
    empty, one device."""
    emulate_devices: int = 0
    """Make this many devices of the CPU, to try a mesh on; 0: use the devices there are."""

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; it must be at least {least}")
        # below the smallest step a division by it is one by zero
        if not (self.temperature == 0 or 1e-30 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature}; it must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it must be more than 0 and at most 1")
        if self.prompt and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file are both given; only one is possible")
        if self.load_state is not None and self.context is not None:
            raise ValueError(f"context={self.context} with --load-state, which keeps its own")
        parse_step(self.step)


LESS = (
    "fewer prompts, a smaller --prefill-chunk, --dtype bfloat16 (of published weights) or a --mesh"
)
LEAST = {"tokens": 0, "top_k": 0, "prefill_chunk": 1, "seed": 0, "emulate_devices": 0}


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong, nothing written. 1: the memory is too small, or
    the state could not be written."""
    about = "Continue prompts with a trained model."
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(GenerateConfig, None, args, "generate", about)
        writable(config.save_state)
        mesh.emulate(config.emulate_devices)
        over = mesh.only(mesh.make(config.mesh), *AXES)
        loaded = load(
            config.checkpoint,
            parse_step(config.step),
            over,
            dtype=config.dtype,
            tokenizer=config.tokenizer,
            stacked=False,
        )
        prompts = texts(config, loaded)
        generator = Generator(loaded.model, over)
        context, used, room = ready(config, loaded, generator, prompts)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        print(f"generate: {memory.short(error, LESS)}", file=sys.stderr)
        return 1
    try:
        context = write(config, loaded, generator, context, prompts)
    except jax.errors.JaxRuntimeError as error:
        print(f"generate: {memory.short(error, LESS)}", file=sys.stderr)
        return 1
    used += config.tokens
    if config.save_state is not None:
        try:
            saved_state.save(config.save_state, context, loaded, used=used, room=room)
        except OSError as error:
            print(f"generate: {config.save_state} cannot be written: {error}", file=sys.stderr)
            return 1
        print(f"state after {used} tokens: {config.save_state}", file=sys.stderr)
    return 0


def writable(path: str | None) -> None:
    """Refuse, before anything is computed, a file that could not be made."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(f"save_state={path!r} is a directory, or its directory does not exist")


def texts(config: GenerateConfig, loaded: Loaded) -> list[np.ndarray]:
    """The prompts as tokens."""
    if loaded.tokenizer is None:
        raise ValueError(
            f"{config.checkpoint} {loaded.without}, so there is no way to read a prompt; name one "
            "with --tokenizer (bytes, if its tokens are bytes)"
        )
    given = list(config.prompt)
    if config.prompt_file is not None:
        given = [read(config.prompt_file)]
    for text in given:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # Python's stand-ins for bytes of a terminal
            raise ValueError(f"--prompt {text!r} is not UTF-8") from None
    prompts = [np.asarray(loaded.tokenizer.encode(text), np.int32) for text in given]
    if config.load_state is None and not (prompts and all(map(len, prompts))):
        empty = "an empty prompt" if prompts else "no --prompt"
        raise ValueError(f"{empty} is given; a model needs at least one token to go on from")
    vocab = loaded.config.task.model.vocab
    for prompt in prompts:
        if len(prompt) and prompt.max() >= vocab:
            raise ValueError(f"the prompt has token {prompt.max()}, the model {vocab} tokens")
    return prompts


def read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={path!r} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"prompt_file={path!r} cannot be read: {error.strerror}") from None


def ready(
    config: GenerateConfig, loaded: Loaded, generator: Generator, prompts: list[np.ndarray]
) -> tuple[Context, int, int]:
    """The context after the prompts, the tokens that it has read, and those it has room for."""
    model, chunk = loaded.config.task.model, config.prefill_chunk
    grows = model.grows
    longest = max(map(len, prompts), default=0)
    if config.load_state is None:
        if config.context is not None and not grows:
            raise ValueError(
                f"context={config.context}, but {model.pattern!r} has no attention without a "
                "window, so its state does not grow"
            )
        needed = longest + config.tokens
        room = config.context or needed if grows else model.attention.window or 1
        if grows and room < needed:
            raise ValueError(
                f"context={room} is too small for a prompt of {longest} tokens and {config.tokens} "
                "more"
            )
        return generator.start(prompts, room, config.seed or 0, chunk), longest, room

    context, used, room = saved_state.load(config.load_state, loaded, generator)
    rows, lengths = len(context.drawn), [len(p) for p in prompts]
    if prompts and (len(prompts) != rows or len(set(lengths)) > 1):
        raise ValueError(
            f"{config.load_state} holds {rows} rows: as many prompts of one length are needed, or "
            f"none; given are prompts of {', '.join(map(str, lengths))} tokens"
        )
    if grows and used + longest + config.tokens > room:
        raise ValueError(
            f"{config.load_state} has read {used} of the {room} tokens it has room for, and "
            f"{longest + config.tokens} more are asked for; save it with a larger --context"
        )
    if config.seed is not None:
        context = context._replace(keys=row_keys([*np.asarray(context.keys)], config.seed))
    if longest:
        context = generator.go_on(context, np.stack(prompts), chunk)
    return context, used + longest, room


def write(
    config: GenerateConfig,
    loaded: Loaded,
    generator: Generator,
    context: Context,
    prompts: list[np.ndarray],
) -> Context:
    """Generate, and print: a single text while it grows, several when they are done."""
    how = Choice(config.temperature, config.top_k, config.top_p)
    rows, times = len(context.drawn), [time.monotonic()]
    tokenizer: Any = loaded.tokenizer
    if rows == 1:
        show = printer(tokenizer.decode)
        if prompts:
            show(prompts[0])

        def each(tokens):
            times.append(time.monotonic())
            show(tokens)

        _, context = generator.generate(context, config.tokens, how, each)
        show(None)
    else:
        tokens, context = generator.generate(context, config.tokens, how)
        for row, continued in enumerate(tokens):
            text = np.concatenate([prompts[row], continued]) if prompts else continued
            print(f"--- {row}\n{tokenizer.decode(text)}")
    spent = time.monotonic() - times[0]
    said = f"{rows * config.tokens} tokens in {spent:.1f} s, compilation included"
    if len(times) > 2:
        said += f"; {len(times[2:]) / (times[-1] - times[1]):.0f} per second after the first"
    print(said, file=sys.stderr)
    return context


def printer(decode: Callable[[list[int]], str]) -> Callable[[np.ndarray | None], None]:
    """Prints tokens as they come, and None as the end; a character's bytes wait until it is whole.

    New tokens are decoded behind the last printed ones, for their text may depend on those.
    """
    printed: list[int] = []
    waiting: list[int] = []

    def show(tokens: np.ndarray | None) -> None:
        nonlocal printed, waiting
        waiting += [] if tokens is None else map(int, tokens)
        text = decode(printed + waiting)
        if tokens is None or not text.endswith("\ufffd"):
            print(text[len(decode(printed)) :], end="\n" if tokens is None else "", flush=True)
            printed, waiting = waiting or printed, []

    return show


if __name__ == "__main__":
    # The loop is one compiled call, in which Python would not see Ctrl-C, nor a reader that left.
    for name in ("SIGINT", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    sys.exit(main())
