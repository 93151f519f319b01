"""Mamba-2 in transformers' layout."""

import math
from collections.abc import Iterator
from typing import Any

from ...layers.mamba import inner_width
from ...layers.mamba2 import Mamba2Config
from ..config import LMConfig
from .llama import ends
from .mamba import WITHOUT_EFFECT, expanded, model, multiple, older
from .options import LARGEST, Options
from .pieces import Piece, fused, kernels

BUFFERS = r"(?!)"  # none


def read(o: Options) -> LMConfig:
    width, depth = o.whole("hidden_size"), o.count("num_hidden_layers")
    inner = expanded(o, "expand", width)
    heads, head_width = o.whole("num_heads", 128), o.whole("head_dim", 64)
    groups, eps = o.whole("n_groups", 8), o.number("layer_norm_epsilon", 1e-5, least=0.0)
    if heads * head_width != inner or heads % groups:
        raise ValueError(
            f"config.json: {heads} num_heads of {head_width=} must be expand x hidden_size = "
            f"{inner}, and divide into n_groups={groups}"
        )
    o.expect("hidden_act", "silu", "swish")
    o.expect("intermediate_size", inner)
    # the norm is after the gate whatever norm_before_gate says, and nothing reads time_step_rank
    o.skip(*WITHOUT_EFFECT, "chunk_size", "norm_before_gate", "time_step_rank")
    older(o, width, depth, inner, eps)
    config = Mamba2Config(
        expand=inner / width,
        head_width=head_width,
        groups=groups,
        state=o.whole("state_size", 128),
        conv=o.whole("conv_kernel", 4),
        dt_limit=_limit(o),
        bias=o.flag("use_bias", False),
        conv_bias=o.flag("use_conv_bias", True),
        norm_eps=eps,
    )
    return model(o, {"mamba2": config}, width, depth, eps, tied=False)


def _limit(o: Options) -> tuple[float, float]:
    """The range that steps are clamped to, whose end may be infinite."""
    limit = o.each("time_step_limit", [0.0, math.inf])
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in limit)
    if not (
        numbers
        and len(limit) == 2
        and -LARGEST <= limit[0] <= min(limit[1], LARGEST)
        and (limit[1] <= LARGEST or limit[1] == math.inf)
    ):
        limit = str(limit)[:80]
        raise ValueError(f"config.json: time_step_limit={limit} is not two numbers in order")
    return float(limit[0]), float(limit[1])


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    mamba = config.mamba2
    inner = inner_width(mamba, config.width)
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "expand": multiple(mamba.expand),
        "num_heads": inner // mamba.head_width,
        "head_dim": mamba.head_width,
        "n_groups": mamba.groups,
        "state_size": mamba.state,
        "conv_kernel": mamba.conv,
        "time_step_limit": list(mamba.dt_limit),
        "use_bias": mamba.bias,
        "use_conv_bias": mamba.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_float32,
        "tie_word_embeddings": config.tie_head,
    }


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield from ends(config, "backbone.embeddings", "backbone.norm_f")
    mamba, inner = config.mamba2, inner_width(config.mamba2, config.width)
    size = mamba.groups * mamba.state
    mixed = {"x": inner, "B": size, "C": size}
    parts = {"z": inner, **mixed, "dt": inner // mamba.head_width}
    for i in range(config.depth):
        at, to = f"backbone.layers.{i}.mixer.", f"layers.{i}.mixer."
        yield Piece(f"backbone.layers.{i}.norm.weight", f"layers.{i}.mixer_norm.scale")
        kernel = [(f"{to}{name}.kernel", rows) for name, rows in parts.items()]
        yield from fused(f"{at}in_proj.weight", "T", kernel)
        if mamba.bias:
            bias = [(f"{to}{name}.bias", rows) for name, rows in parts.items()]
            yield from fused(f"{at}in_proj.bias", "same", bias)
        kernel = [(f"{to}{name}_conv.kernel", rows) for name, rows in mixed.items()]
        yield from fused(f"{at}conv1d.weight", "conv", kernel)
        if mamba.conv_bias:
            bias = [(f"{to}{name}_conv.bias", rows) for name, rows in mixed.items()]
            yield from fused(f"{at}conv1d.bias", "same", bias)
        for name in ("dt_bias", "A_log", "D"):
            yield Piece(f"{at}{name}", f"{to}{name}")
        yield Piece(f"{at}norm.weight", f"{to}scale")
        yield from kernels(at, to, {"out_proj": "out"}, mamba.bias)
