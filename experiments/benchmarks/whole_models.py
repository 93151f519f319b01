"""Language models by the trainer's own step and the generator's own loop, and what bounds them.

A model that another library has too is read from that library's config, so that both are of one
architecture and size; their weights are random.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ...models import LM, LMConfig, merge, split
from ...models.pretrained.families import config_of, kind_of
from .. import step, timing
from ..optimizer import OptimizerConfig
from ..sampling import Choice, Generator
from ..tasks.lm import LMTask
from . import problems
from .prepared import prepared
from .table import Row

VOCAB, WIDTH, DEPTH, RATE = 256, 256, 4, 1e-3
LAYERS = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": DEPTH}
DECODER = LAYERS | {
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
THEIRS: dict[str, dict[str, Any]] = {  # as their config.json has it
    "mamba": {"model_type": "mamba", "state_size": 16} | LAYERS,
    "mamba2": {"model_type": "mamba2", "num_heads": 8, "n_groups": 1} | LAYERS,
    "llama": {"model_type": "llama"} | DECODER,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None} | DECODER,
    "retnet": {
        "vocab_size": VOCAB,
        "decoder_embed_dim": WIDTH,
        "decoder_layers": DEPTH,
        "decoder_value_embed_dim": 2 * WIDTH,
        "decoder_ffn_embed_dim": 2 * WIDTH,
        "decoder_retention_heads": 4,
        "chunkwise_recurrent": True,
        "recurrent_chunk_size": 64,
    },
}
OURS = {
    name: LMConfig(vocab=VOCAB, width=WIDTH, depth=DEPTH, pattern=f"{name}+swiglu")
    for name in ("gla", "lightning", "aaren")
}
NAMES = (*THEIRS, *OURS)


class Training(NamedTuple):
    """Logits of whole rows and a training step, each of which has run once."""

    forward: Callable[[], Any]
    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    about: Row


class Decoding(NamedTuple):
    """Greedy decoding of so many tokens after one; it has run once."""

    decode: Callable[[], Any]
    wait: Callable[[Any], Any]
    about: Row


def config(name: str) -> LMConfig:
    if name in OURS:
        return OURS[name]
    return config_of(kind_of(THEIRS[name]), THEIRS[name])


def text(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=(rows, length), dtype=np.int32)


def training(config: LMConfig, rows: int, length: int) -> Training:
    given = text(rows, length + 1)
    batch = {
        "tokens": given[:, :-1],
        "targets": given[:, 1:],
        "reset": np.zeros((rows, length), bool),
        "weights": np.ones((rows, length), np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    task = LMTask(rows=rows, length=length, model=config)
    program, state = step.build(task, OptimizerConfig(), 0, 1)
    rest, rate, draw = program.rest, jnp.float32(RATE), jnp.zeros(2, jnp.uint32)
    begun = time.perf_counter()
    train = program.step.lower(state, rest, batch, rate, draw).compile()

    def logits(params, rest, tokens):
        model: Any = merge(program.graphdef, params, rest)
        return model(tokens)[0]

    read = timing.compiled(logits, (state["params"], rest, batch["tokens"]))
    spent = time.perf_counter() - begun
    at = [state]

    def one_step():
        at[0], metrics = train(at[0], rest, batch, rate, draw)
        return metrics

    def forward():
        return read(at[0]["params"], rest, batch["tokens"])

    jax.block_until_ready((forward(), one_step()))
    about: Row = {
        "parameters": sum(x.size for x in jax.tree.leaves(state["params"])),
        "temporaries_mb": train.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_s": spent,
    }
    return Training(forward, one_step, jax.block_until_ready, about)


def decoding(config: LMConfig, rows: int, tokens: int) -> Decoding:
    single = dataclasses.replace(config, stacked=False)  # as `generate` has it
    generator = Generator(LM(single, rngs=nnx.Rngs(0)))
    prompts = list(text(rows, 1))

    def decode():
        context = generator.start(prompts, 1 + tokens, seed=0, chunk=1)
        return generator.generate(context, tokens, Choice(temperature=0))[0]

    begun = time.perf_counter()
    decode()
    about: Row = {
        "parameters": sum(x.size for x in jax.tree.leaves(generator.variables[0])),
        "first_s": time.perf_counter() - begun,
    }
    return Decoding(decode, jax.block_until_ready, about)


def products(config: LMConfig) -> int:
    """Operations of a token's products with matrices of weights, forward; a multiply-add is two."""
    params = split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))[1]
    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [str(getattr(each, "key", "")) for each in path]
        share = 1.0
        if names[-2:-1] == ["mlp"]:  # of all experts a token takes some
            share = config.moe.router.choices / config.moe.experts
        elif names[-1] == "embedding":
            share = float(config.tie_head)  # else it is only looked up
        elif names[-1] != "kernel" or "conv" in names[-2]:
            continue
        total += 2 * leaf.size * share
    return round(total)


def mixing(config: LMConfig, rows: int, length: int) -> list[Callable[[], float]]:
    """What says the seconds that the mixers' operations of all blocks take alone: forward, and in
    both passes."""
    operations = problems.of_model(config, rows, length)
    each = [(times, prepared(of.ours, of.arguments)) for of, times in operations]

    def forward():
        return sum(times * timing.seconds(op.forward) for times, op in each)

    def both():
        return sum(times * timing.seconds(op.both) for times, op in each)

    return [forward, both]


def least(config: LMConfig, tokens: int, flops: float, mixing: Sequence[float]) -> list[float]:
    """Seconds of a forward pass and of a training step of so many tokens: products of weights at
    this rate, and what the mixers' operations take alone."""
    product = products(config) * tokens / flops
    return [product + mixing[0], 3 * product + mixing[1]]


def moved(config: LMConfig, rows: int, tokens: int) -> float:
    """Bytes that decoding a token of each row reads or writes at least: the weights that it is
    multiplied by, and the state twice; of caches with room for `tokens` that is once their half,
    for they are read up to where they are filled."""
    model: Any = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: model.init_state(rows, tokens))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    weights = products(config) / 2 * jnp.dtype(config.param_dtype).itemsize
    return weights + (size / 2 if config.grows else 2 * size)
