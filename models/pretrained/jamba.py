"""Jamba in transformers' layout: Mamba, attention without positions, MLPs and experts."""

from collections.abc import Iterator
from typing import Any

from ...layers.attention import AttentionConfig
from ...layers.mamba import MambaConfig
from ...layers.mlp import MLPConfig
from ...layers.moe import MoEConfig
from ...layers.router import RouterConfig
from ..config import LMConfig
from ..pattern import parse, written
from .llama import MLP, attention_pieces, balance, ends, experts
from .mamba import expanded, mixer, multiple, rank
from .options import Options
from .pieces import Piece, kernels

BUFFERS = r"(?!)"  # none


def read(o: Options) -> LMConfig:
    width, depth = o.whole("hidden_size"), o.count("num_hidden_layers")
    eps, moe = o.number("rms_norm_eps", 1e-6, least=0.0), _experts(o)
    attention = _layers(o, "attn_layer", (8, 4), depth)
    sparse = _layers(o, "expert_layer", (2, 1), depth)
    blocks = [
        ("attention" if i in attention else "mamba", "moe" if moe and i in sparse else "swiglu")
        for i in range(depth)
    ]
    o.expect("hidden_act", "silu", "swish")
    o.expect("attention_dropout", 0.0, 0)
    o.expect("sliding_window")  # one of its kinds of attention used to heed it, others never
    o.expect("mamba_inner_layernorms", True)
    named = "num_key_value_heads" in o.values
    o.skip("calc_logits_for_entire_prompt", "n_ctx", "num_logits_to_keep")
    o.skip("use_associative_scan", "use_mamba_kernels", "use_mambapy")
    return LMConfig(
        vocab=o.whole("vocab_size"),
        width=width,
        depth=depth,
        pattern=written(map("+".join, blocks)),
        norm_eps=eps,
        tie_head=o.flag("tie_word_embeddings", False),
        mlp=MLPConfig(hidden=o.whole("intermediate_size")),
        moe=moe or MoEConfig(),
        mamba=MambaConfig(
            expand=expanded(o, "mamba_expand", width) / width,
            state=o.whole("mamba_d_state", 16),
            conv=o.whole("mamba_d_conv", 4),
            dt_rank=rank(o, "mamba_dt_rank"),
            bias=o.flag("mamba_proj_bias", False),
            conv_bias=o.flag("mamba_conv_bias", True),
            norm="weighted",
            norm_eps=eps,
        ),
        attention=AttentionConfig(
            heads=o.whole("num_attention_heads"),
            # null is not the default: it was as many as query heads
            kv_heads=o.whole("num_key_value_heads", None if named else 8),
            rope_base=None,
        ),
    )


def _experts(o: Options) -> MoEConfig | None:
    """None where there is but one, which is an MLP."""
    count, top = o.count("num_experts", 16), o.whole("num_experts_per_tok", 2)
    logits = o.flag("output_router_logits", False)
    coefficient = o.number("router_aux_loss_coef", 0.001)
    if count == 1:
        return None
    added = top * coefficient if logits else 0.0
    router = RouterConfig(top=top, renormalize=False, balance=added, pooled=True, z=0.0)
    return MoEConfig(experts=count, router=router)


def _layers(o: Options, name: str, default: tuple[int, int], depth: int) -> set[int]:
    """Every so many layers, from one on."""
    period = o.whole(f"{name}_period", default[0], most=2**31)
    offset = o.whole(f"{name}_offset", default[1], least=0, most=2**31)
    return {i for i in range(depth) if i % period == offset}


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    mamba, attention, moe = config.mamba, config.attention, config.moe
    blocks = parse(config.pattern, config.depth)
    sparse = [block.mlp == "moe" for block in blocks]
    hidden = config.mlp.width(config.width)
    # their loss of no experts is an error
    router = moe.router if any(sparse) else RouterConfig(balance=0.0)
    return {
        "architectures": ["JambaForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": (all(sparse) and moe.hidden) or hidden,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        **_every("attn_layer", [block.mixer == "attention" for block in blocks]),
        **_every("expert_layer", sparse),
        "num_experts": moe.experts if any(sparse) else 1,
        "num_experts_per_tok": router.choices,
        **balance(router),
        "mamba_d_state": mamba.state,
        "mamba_d_conv": mamba.conv,
        "mamba_expand": multiple(mamba.expand),
        "mamba_dt_rank": mamba.dt_rank or -(-config.width // 16),
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_head,
    }


def _every(name: str, found: list[bool]) -> dict[str, int]:
    """A period and an offset that say which layers; a period of all if none do."""
    depth = len(found)
    pairs = [(period, offset) for period in range(1, depth + 2) for offset in range(period)]
    fits = (p for p in pairs if [i % p[0] == p[1] for i in range(depth)] == found)
    period, offset = next(fits, (1, 0))
    return {f"{name}_period": period, f"{name}_offset": offset}


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield from ends(config, norm="model.final_layernorm")
    for i, block in enumerate(parse(config.pattern, config.depth)):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        yield Piece(f"{at}input_layernorm.weight", f"{to}mixer_norm.scale")
        yield Piece(f"{at}pre_ff_layernorm.weight", f"{to}mlp_norm.scale")
        if block.mixer == "attention":
            yield from attention_pieces(f"{at}self_attn.", f"{to}mixer.", config.attention)
        else:
            yield from mixer(f"{at}mamba.", f"{to}mixer.", config)
            for name in ("dt", "B", "C"):
                yield Piece(
                    f"{at}mamba.{name.lower()}_layernorm.weight", f"{to}mixer.{name}_norm.scale"
                )
        if block.mlp == "moe":
            yield from experts(f"{at}feed_forward.", f"{to}mlp.", config, MLP, "router")
        else:
            yield from kernels(f"{at}feed_forward.", f"{to}mlp.", MLP)
