"""Llama, Mistral, Mixtral and Qwen2-MoE in transformers' layout."""

from collections.abc import Iterator
from typing import Any

from ...layers.attention import AttentionConfig
from ...layers.mlp import MLPConfig
from ...layers.moe import MoEConfig
from ...layers.router import RouterConfig
from ..config import LMConfig
from ..pattern import parse, written
from .options import Options
from .pieces import Piece, kernels

BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
MIXTRAL = {"w1": "gate", "w3": "up", "w2": "down"}
KV_HEADS = {"llama": None, "mistral": 8, "mixtral": 8, "qwen2_moe": 16}  # where none are named


def read(o: Options) -> LMConfig:
    kind, depth = o.text("model_type"), o.count("num_hidden_layers")
    o.expect("hidden_act", "silu")
    o.expect("attention_dropout", 0.0, 0)
    o.expect("pretraining_tp", 1)
    o.expect("is_llama_config", True)
    o.expect("rope_interleaved", False)
    bias = o.flag("attention_bias", False) if kind == "llama" else False
    attention = AttentionConfig(
        heads=o.whole("num_attention_heads"),
        kv_heads=o.whole("num_key_value_heads", o.unless(KV_HEADS[kind], "num_key_value_heads")),
        head_width=o.whole("head_dim", None),
        window=_window(o, kind, depth),
        rope_base=rope_base(o, 1e6 if kind == "mixtral" else 1e4),
        bias=o.flag("qkv_bias", True) if kind == "qwen2_moe" else bias,
        out_bias=bias,
    )
    blocks, moe = ["swiglu"] * depth, MoEConfig()
    if kind == "mixtral":
        blocks, moe = ["moe"] * depth, mixtral(o)
    if kind == "qwen2_moe":
        blocks, moe = _qwen(o, depth)
    return LMConfig(
        vocab=o.whole("vocab_size"),
        width=o.whole("hidden_size"),
        depth=depth,
        pattern=written([f"attention+{mlp}" for mlp in blocks]),
        norm_eps=o.number("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6, least=0.0),
        tie_head=o.flag("tie_word_embeddings", False),
        mlp=MLPConfig(
            hidden=o.whole("intermediate_size"),
            bias=o.flag("mlp_bias", False) if kind == "llama" else False,
        ),
        moe=moe,
        attention=attention,
    )


def rope_base(o: Options, default: float = 10000.0) -> float:
    """The base of plain rotary positions, which older files keep elsewhere."""
    rope = o.mapping("rope_parameters", None)
    rope.expect("rope_parameters.rope_type", "default")
    rope.expect("rope_parameters.partial_rotary_factor", 1.0)
    older = o.number("rope_theta", default, least=1.0)
    base = rope.number("rope_parameters.rope_theta", older, least=1.0)
    rope.done()
    o.expect("rope_scaling")
    return base


def mixtral(o: Options) -> MoEConfig:
    """The experts of Mixtral and MiniMax: softmax, the top k, weights over their sum."""
    top, logits = o.whole("num_experts_per_tok", 2), o.flag("output_router_logits", False)
    o.expect("router_jitter_noise", 0.0, 0)
    coefficient = o.number("router_aux_loss_coef", 0.001)  # used where the logits are put out
    # their share of an expert is k times ours
    balance = top * coefficient if logits else 0.0
    router = RouterConfig(top=top, balance=balance, pooled=True, z=0.0)
    return MoEConfig(experts=o.count("num_local_experts", 8), router=router)


def _qwen(o: Options, depth: int) -> tuple[list[str], MoEConfig]:
    every, dense = o.whole("decoder_sparse_step", 1, most=2**31), o.each("mlp_only_layers", [])
    if not all(type(i) is int for i in dense):
        raise ValueError(
            f"config.json: mlp_only_layers={str(dense)[:80]} are not all whole numbers"
        )
    kinds = ["moe" if i not in dense and (i + 1) % every == 0 else "swiglu" for i in range(depth)]
    top, logits = o.whole("num_experts_per_tok", 4), o.flag("output_router_logits", False)
    coefficient = o.number("router_aux_loss_coef", 0.001)
    router = RouterConfig(
        top=top,
        renormalize=o.flag("norm_topk_prob", False),
        balance=top * coefficient if logits else 0.0,
        pooled=True,
        z=0.0,
    )
    return kinds, MoEConfig(
        experts=o.count("num_experts", 60),
        hidden=o.whole("moe_intermediate_size", 1408),
        shared=o.whole("shared_expert_intermediate_size", 5632),
        shared_gate=True,
        router=router,
    )


def _window(o: Options, kind: str, depth: int) -> int | None:
    if kind == "llama":
        return None
    if kind == "qwen2_moe":
        o.expect("use_sliding_window", False)
        o.skip("sliding_window", "max_window_layers")
        o.expect("layer_types", ["full_attention"] * depth)
        return None
    default = 4096 if kind == "mistral" else None
    return o.whole("sliding_window", o.unless(default, "sliding_window"), most=2**31)


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    attention, moe = config.attention, config.moe
    blocks = [block.mlp for block in parse(config.pattern, config.depth)]
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_width or config.width // attention.heads,
        "intermediate_size": config.mlp.width(config.width),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_base},
        "tie_word_embeddings": config.tie_head,
    }
    if kind == "llama":
        return values | {"attention_bias": attention.bias, "mlp_bias": config.mlp.bias}
    if kind != "qwen2_moe":
        values |= {"sliding_window": attention.window}
    if kind == "mixtral":
        values |= {"intermediate_size": moe.hidden or config.mlp.width(config.width)}
        values |= mixtral_options(moe)
    if kind == "qwen2_moe":
        values |= {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.router.choices,
            "moe_intermediate_size": moe.hidden or config.mlp.width(config.width),
            "shared_expert_intermediate_size": moe.shared,
            "norm_topk_prob": moe.router.renormalize,
            "mlp_only_layers": [i for i, mlp in enumerate(blocks) if mlp != "moe"],
            "qkv_bias": attention.bias,
            **balance(moe.router),
        }
    return values


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}


def mixtral_options(moe: MoEConfig) -> dict[str, Any]:
    router = moe.router
    options = {"num_local_experts": moe.experts, "num_experts_per_tok": router.choices}
    return options | balance(router)


def balance(router: RouterConfig) -> dict[str, Any]:
    coefficient = (0.01 if router.balance is None else router.balance) / router.choices
    return {"router_aux_loss_coef": coefficient, "output_router_logits": coefficient > 0}


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield from ends(config)
    attention = config.attention
    for i, block in enumerate(parse(config.pattern, config.depth)):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        yield from norms(at, to)
        yield from attention_pieces(f"{at}self_attn.", f"{to}mixer.", attention)
        if block.mlp != "moe":
            yield from kernels(f"{at}mlp.", f"{to}mlp.", MLP, config.mlp.bias)
        elif kind == "mixtral":
            yield from experts(f"{at}block_sparse_moe.", f"{to}mlp.", config, MIXTRAL)
        else:
            yield from experts(f"{at}mlp.", f"{to}mlp.", config, MLP)
            yield from kernels(f"{at}mlp.shared_expert.", f"{to}mlp.shared.", MLP)
            yield from kernels(f"{at}mlp.", f"{to}mlp.", {"shared_expert_gate": "shared_gate"})


def ends(
    config: LMConfig, embedding: str = "model.embed_tokens", norm: str = "model.norm"
) -> Iterator[Piece]:
    """The embedding, the last norm, and the head where it is not the embedding."""
    yield Piece(f"{embedding}.weight", "embedding")
    yield Piece(f"{norm}.weight", "norm.scale")
    if not config.tie_head:
        yield Piece("lm_head.weight", "head.kernel", "T")


def norms(at: str, to: str) -> Iterator[Piece]:
    yield Piece(f"{at}input_layernorm.weight", f"{to}mixer_norm.scale")
    yield Piece(f"{at}post_attention_layernorm.weight", f"{to}mlp_norm.scale")


def attention_pieces(at: str, to: str, attention: AttentionConfig) -> Iterator[Piece]:
    for theirs, ours in ATTENTION.items():
        bias = attention.out_bias if ours == "out" else attention.bias
        yield from kernels(at, to, {theirs: ours}, bias)


def experts(
    at: str, to: str, config: LMConfig, names: dict[str, str], router: str = "gate"
) -> Iterator[Piece]:
    """A router and its experts, whose hidden features lie one after the other in ours."""
    yield from kernels(at, to, {router: "router"})
    hidden = config.moe.hidden or config.mlp.width(config.width)
    for theirs, ours in names.items():
        form = "T" if ours == "down" else "same"
        for e in range(config.moe.experts):
            rows = slice(e * hidden, (e + 1) * hidden)
            yield Piece(f"{at}experts.{e}.{theirs}.weight", f"{to}{ours}", form, at=rows)
