"""A folder of runs, published models and texts, most of them wrong in one way."""

import json
import shutil
from pathlib import Path

import numpy as np

from . import published, untrained


def make(here: Path) -> Path:
    for name in ("texts", "empty", "json"):
        (here / name).mkdir()
    for name in "ab":
        (here / "texts" / f"{name}.txt").write_text("alpha, beta and gamma\n" * 40)
    (here / "json" / "config.json").write_text("{'width': 16}")
    (here / "empty.txt").touch()
    (here / "short.txt").write_text("alpha")
    (here / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (here / "rows.jsonl").write_text('{"text": "alpha"}\n{"body": "beta"}\n')
    (here / "cut.jsonl").write_text('{"text": "alp')
    (here / "other.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    np.save(here / "floats.npy", np.ones(99, np.float32))
    np.save(here / "square.npy", np.ones((3, 4), np.int32))
    np.save(here / "ids.npy", np.full(999, 99, np.int32))
    untrained.save(here / "run")
    published.make(here / "llama")
    weights = (here / "llama" / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for name, content in {"pointer": pointer, "cut": weights[:-9], "gpt2": weights}.items():
        shutil.copytree(here / "llama", here / name)
        (here / name / "model.safetensors").write_bytes(content)
    options = json.loads((here / "llama" / "config.json").read_text())
    (here / "gpt2" / "config.json").write_text(json.dumps(options | {"model_type": "gpt2"}))
    shutil.copytree(here / "llama", here / "torch")
    (here / "torch" / "model.safetensors").rename(here / "torch" / "pytorch_model.bin")
    return here
