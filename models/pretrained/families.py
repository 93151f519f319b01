"""Which file knows a kind of model, by what config.json calls it."""

import json
from types import ModuleType
from typing import Any

from ..config import LMConfig
from . import fla, jamba, llama, mamba, mamba2, minimax, torchscale, transnormer
from .options import Options

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "mixtral": llama,
    "qwen2_moe": llama,
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "minimax": minimax,
    "gla": fla,
    "retnet": fla,
    "torchscale": torchscale,
    "transnormer": transnormer,
}


def kind_of(values: dict[str, Any]) -> str:
    """The family, by what config.json calls it."""
    kind = values.get("model_type")
    if kind is None and "decoder_retention_heads" in values:
        kind = "torchscale"
    if not (isinstance(kind, str) and kind in FAMILIES):
        value = json.dumps(kind)[:80]
        raise ValueError(f"config.json: model_type={value} is not one of {', '.join(FAMILIES)}")
    return kind


def config_of(kind: str, values: dict[str, Any], *files: Any) -> LMConfig:
    """Our config of theirs, with every option understood; `files` is what Options knows of them."""
    asked = Options(values, *files)
    config = FAMILIES[kind].read(asked)
    asked.skip("model_type")
    asked.done()
    return config
