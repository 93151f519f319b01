"""TransNormerLLM in its authors' layout."""

from collections.abc import Iterator
from typing import Any

from ...layers.lightning import LightningConfig
from ...layers.mlp import MLPConfig
from ..config import LMConfig
from .options import Options
from .pieces import Piece, fused, kernels

BUFFERS = r"model\.(slopes|_linear_attn_mask)"
MLP = {"l1": "gate", "l2": "up", "l3": "down"}
HEAD = "lm_head.weight"
EPS = 1e-6  # of every norm, no option


def read(o: Options) -> LMConfig:
    o.skip("add_bos_token")
    o.expect("norm_type", "simplermsnorm")
    o.expect("linear_act_fun", "silu", "swish")
    o.expect("bias", False)
    width, depth = o.whole("decoder_embed_dim", 1024), o.count("decoder_layers", 24)
    heads, inner = o.whole("decoder_attention_heads", 8), o.whole("hidden_dim", 1024)
    if inner % heads:
        raise ValueError(f"config.json: hidden_dim={inner} does not divide into {heads} heads")
    return LMConfig(
        vocab=o.whole("vocab_size", 64000),
        width=width,
        depth=depth,
        pattern="lightning+glu",
        norm="simple",
        norm_eps=EPS,
        # their class names no default: older transformers tied it and kept one of the two
        tie_head=o.flag("tie_word_embeddings", o.held is not None and HEAD not in o.held),
        embed_scale=not o.flag("no_scale_embedding", False),
        mlp=MLPConfig(hidden=o.whole("glu_dim", 2816)),
        lightning=LightningConfig(
            heads=heads, head_width=inner // heads, lrpe_layers=_lrpe(o, depth), norm_eps=EPS
        ),
    )


def _lrpe(o: Options, depth: int) -> int:
    """How many layers have LRPE: the first ones, as in every released model."""
    each = o.each("linear_use_lrpe_list", [])
    if not each:
        o.expect("linear_use_lrpe", 0)
        return 0
    o.skip("linear_use_lrpe")  # what the last layer made of it
    count = each.count(1)
    if each != [1] * count + [0] * (depth - count):
        raise ValueError(
            f"config.json: linear_use_lrpe_list={str(each)[:80]} is not supported; it can be "
            f"{depth} numbers, 1 in the first layers and 0 in the others"
        )
    return count


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    lightning, depth = config.lightning, config.depth
    lrpe = min(lightning.lrpe_layers, depth)
    head = lightning.head_width or config.width // lightning.heads
    return {
        "architectures": ["TransnormerForCausalLM"],
        "vocab_size": config.vocab,
        "decoder_embed_dim": config.width,
        "decoder_layers": depth,
        "decoder_attention_heads": lightning.heads,
        "hidden_dim": lightning.heads * head,
        "glu_dim": config.mlp.width(config.width),
        "no_scale_embedding": not config.embed_scale,
        "norm_type": "simplermsnorm",
        "linear_use_lrpe_list": [1] * lrpe + [0] * (depth - lrpe),
        "linear_act_fun": "silu",
        "bias": False,
        "tie_word_embeddings": config.tie_head,
    }


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield Piece("model.embed_tokens.weight", "embedding")
    if not config.tie_head:
        yield Piece(HEAD, "head.kernel", "T")
    lightning = config.lightning
    inner = lightning.heads * (lightning.head_width or config.width // lightning.heads)
    for i in range(config.depth):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        parts = [(f"{to}mixer.{name}.kernel", inner) for name in ("q", "k", "v", "gate")]
        yield from fused(f"{at}token_mixer.qkvu_proj.weight", "T", parts)
        yield from kernels(f"{at}token_mixer.", f"{to}mixer.", {"out_proj": "out"})
        if i < lightning.lrpe_layers:
            yield Piece(f"{at}token_mixer.lrpe.theta", f"{to}mixer.theta", "squeeze")
        yield from kernels(f"{at}channel_mixer.", f"{to}mlp.", MLP)
