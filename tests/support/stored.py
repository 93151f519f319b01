"""A small checkpoint of Llama's kind in transformers' layout, to be damaged."""

import json
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scanax.models import LM, split
from scanax.models.pretrained import UncheckedWarning, load_pretrained

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def tensors(config: dict = CONFIG) -> dict[str, np.ndarray]:
    """The tensors that config.json asks for, by name."""
    width, hidden, vocab = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (width,),
            f"{at}self_attn.q_proj.weight": (queries, width),
            f"{at}self_attn.k_proj.weight": (keys, width),
            f"{at}self_attn.v_proj.weight": (keys, width),
            f"{at}self_attn.o_proj.weight": (width, queries),
            f"{at}post_attention_layernorm.weight": (width,),
            f"{at}mlp.gate_proj.weight": (hidden, width),
            f"{at}mlp.up_proj.weight": (hidden, width),
            f"{at}mlp.down_proj.weight": (width, hidden),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, shards: int = 1, config: dict = CONFIG) -> Path:
    """As transformers writes it: without checksums, in one file or in several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    every, where = tensors(config), {}
    for i in range(shards):
        file = SINGLE if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: every[name] for name in list(every)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return folder


def edit(folder: Path, change: Callable[[dict], object], file: str = SINGLE) -> None:
    """Change the tensors of one file, as a dict."""
    held = load_file(folder / file)
    change(held)
    save_file(held, folder / file, metadata={"format": "pt"})


def configure(folder: Path, file: str = "config.json", **options: object) -> None:
    """Change options; None takes one away."""
    values = json.loads((folder / file).read_text()) | options
    values = {name: value for name, value in values.items() if value is not None}
    (folder / file).write_text(json.dumps(values))


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def quietly(folder: Path) -> LM:
    """The model, without a word about checksums."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncheckedWarning)
        return load_pretrained(folder)


def same(model: LM, other: LM) -> bool:
    """Whether two models are one function: the config and every bit of the parameters."""
    ours, theirs = split(model)[1], split(other)[1]
    return model.config == other.config and all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def refused(folder: Path | str, says: str, kind: type[Exception] = ValueError) -> str:
    """It raises one line that `says` is found in, soon, and without much memory."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(kind, match=says) as caught:
            quietly(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000, text
    assert time.monotonic() - start < 20
    assert peak < 64 * 2**20
    return text
