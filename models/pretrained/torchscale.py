"""RetNet in torchscale's layout: the options and the state dict of its RetNetDecoder."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...layers import decay
from ...layers.mlp import MLPConfig
from ...layers.retention import RetentionConfig
from ..config import LMConfig
from ..pattern import parse
from .options import Options
from .pieces import Piece, kernels

BUFFERS = r"retnet_rel_pos\.(angle|decay)"
HEAD = "output_projection.weight"
ACTIVATIONS = {"gelu": "geglu", "swish": "swiglu"}
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "gate", "out_proj": "out"}
MLP = {"fc1": "gate", "gate": "up", "fc2": "down"}
# Which form of retention runs, where it runs, and how training begins.
WITHOUT_EFFECT = (
    "checkpoint_activations",
    "chunkwise_recurrent",
    "ddp_rank",
    "fsdp",
    "max_target_positions",
    "recurrent_chunk_size",
    "subln",
)
# How experts are chosen, where there are any.
OF_EXPERTS = (
    "moe_eval_capacity_token_fraction",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_normalize_gate_prob_before_dropping",
    "moe_second_expert_policy",
    "moe_top1_expert",
    "use_xmoe",
)


def read(o: Options) -> LMConfig:
    o.skip(*WITHOUT_EFFECT, *OF_EXPERTS)
    o.expect("moe_freq", 0)
    for name in ("dropout", "drop_path_rate", "activation_dropout"):
        o.expect(name, 0.0, 0)
    for name in ("deepnorm", "layernorm_embedding", "multiway", "no_output_layer"):
        o.expect(name, False)
    o.expect("decoder_normalize_before", True)
    o.expect("rel_pos_buckets", 0)
    o.expect("max_rel_pos", 0)
    o.expect("activation_fn", *ACTIVATIONS)
    width, eps = o.whole("decoder_embed_dim", 768), o.number("layernorm_eps", 1e-6)
    return LMConfig(
        vocab=o.whole("vocab_size"),
        width=width,
        depth=o.whole("decoder_layers", 12),
        pattern=f"retention+{ACTIVATIONS[o.text('activation_fn', 'gelu')]}",
        norm_eps=eps,
        tie_head=o.flag("share_decoder_input_output_embed", False),
        embed_scale=not o.flag("no_scale_embedding", True),
        mlp=MLPConfig(hidden=o.whole("decoder_ffn_embed_dim", 1280)),
        retention=RetentionConfig(
            heads=o.whole("decoder_retention_heads"),
            value_ratio=o.whole("decoder_value_embed_dim", 1280) / width,
            interleaved=True,
            inclusive=True,
            scale_keys=True,
            norm_scale=False,
            norm_eps=eps,
        ),
    )


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    retention, mlp = config.retention, parse(config.pattern, config.depth)[0].mlp
    return {
        "model_type": None,  # decoder_retention_heads says what it is
        "vocab_size": config.vocab,
        "decoder_embed_dim": config.width,
        "decoder_layers": config.depth,
        "decoder_retention_heads": retention.heads,
        "decoder_value_embed_dim": round(config.width * retention.value_ratio),
        "decoder_ffn_embed_dim": config.mlp.width(config.width),
        "decoder_normalize_before": True,
        "activation_fn": "gelu" if mlp == "geglu" else "swish",
        "no_scale_embedding": not config.embed_scale,
        "share_decoder_input_output_embed": config.tie_head,
        "layernorm_eps": config.norm_eps,
    }


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield Piece("embed_tokens.weight", "embedding")
    yield Piece("layer_norm.weight", "norm.scale")
    if not config.tie_head:
        yield Piece(HEAD, "head.kernel", "T")
    for i in range(config.depth):
        at, to = f"layers.{i}.", f"layers.{i}."
        yield Piece(f"{at}retention_layer_norm.weight", f"{to}mixer_norm.scale")
        yield from kernels(f"{at}retention.", f"{to}mixer.", PROJECTIONS)
        yield Piece(f"{at}final_layer_norm.weight", f"{to}mlp_norm.scale")
        yield from kernels(f"{at}ffn.", f"{to}mlp.", MLP)


def buffers(config: LMConfig) -> dict[str, np.ndarray]:
    """What a strict load of the state dict asks for: radians per token, and log decays."""
    heads = config.retention.heads
    pairs = round(config.width * config.retention.key_ratio) // heads // 2
    angle = np.repeat(10000.0 ** -np.linspace(0, 1, pairs), 2)
    found = {"angle": angle, "decay": decay.retention(heads)}
    return {f"retnet_rel_pos.{name}": x.astype(np.float32) for name, x in found.items()}
