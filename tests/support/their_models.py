"""Small models of transformers (extra `parity`), of sizes and options drawn at random.

`CONFIGS` has a function of a generator for each kind of model; `build` draws the weights as well.
"""

from collections.abc import Callable

import torch
import transformers
from numpy.random import Generator
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Which of their implementations: the ones that take any size.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
# What a model starts from matters here (decays, steps): these are moved a little, not drawn.
STARTED = ("A_log", "D", "dt_bias", "dt_proj.bias")


def build(kind: str, rng: Generator) -> PreTrainedModel:
    """In float32, with weights large enough that each of them shows in the logits."""
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](rng), **PLAIN).float().eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.from_numpy(rng.normal(0.0, 0.2, x.shape)).float()
            if name.endswith(STARTED) or (x.ndim == 1 and name.endswith("weight")):
                x.add_(noise)  # a norm's scale stays near one
            else:
                x.copy_(noise)
    return model


def flip(rng: Generator) -> bool:
    return bool(rng.integers(2))


def decoder(rng: Generator) -> dict:
    """The options that all decoders of Llama's kind share."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    width = heads * 2 * int(rng.integers(2, 6))
    own = {"head_dim": int(rng.choice([4, 6, 10]))} if flip(rng) else {}
    return own | {
        "vocab_size": int(rng.integers(40, 100)),
        "hidden_size": width,
        "intermediate_size": int(rng.integers(20, 60)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-3])),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(rng.choice([100.0, 10000.0, 1e6])),
        },
        "tie_word_embeddings": flip(rng),
    }


def llama(rng: Generator) -> PretrainedConfig:
    return transformers.LlamaConfig(
        **decoder(rng), attention_bias=flip(rng), mlp_bias=flip(rng), pretraining_tp=1
    )


def mistral(rng: Generator) -> PretrainedConfig:
    """With a window shorter than the text."""
    return transformers.MistralConfig(**decoder(rng), sliding_window=int(rng.integers(2, 20)))


def mixtral(rng: Generator) -> PretrainedConfig:
    experts = int(rng.integers(2, 7))
    return transformers.MixtralConfig(
        **decoder(rng),
        sliding_window=int(rng.integers(2, 20)) if flip(rng) else None,
        num_local_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)),
        output_router_logits=flip(rng),
        router_aux_loss_coef=0.02,
    )


def qwen2_moe(rng: Generator) -> PretrainedConfig:
    options, experts = decoder(rng), int(rng.integers(2, 7))
    depth = options["num_hidden_layers"] = int(rng.integers(2, 5))
    every = int(rng.integers(1, 3))
    options.pop("head_dim", None)  # it knows none
    return transformers.Qwen2MoeConfig(
        **options,
        qkv_bias=flip(rng),
        num_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)),
        norm_topk_prob=flip(rng),
        moe_intermediate_size=int(rng.integers(10, 40)),
        shared_expert_intermediate_size=int(rng.integers(10, 40)),
        decoder_sparse_step=every,  # a layer of experts is left, or its loss is an error of theirs
        mlp_only_layers=[i for i in range(depth) if rng.random() < 0.3 and i != every - 1],
        output_router_logits=flip(rng),
        router_aux_loss_coef=0.02,
    )


def mamba(rng: Generator) -> PretrainedConfig:
    return transformers.MambaConfig(**selective(rng))


def falcon_mamba(rng: Generator) -> PretrainedConfig:
    eps = float(rng.choice([1e-6, 1e-3]))
    return transformers.FalconMambaConfig(**selective(rng), mixer_rms_eps=eps)


def selective(rng: Generator) -> dict:
    """The options that Mamba and FalconMamba share: an inner width may contradict `expand`."""
    own = {"intermediate_size": int(rng.integers(5, 60))} if flip(rng) else {}
    return own | {
        "vocab_size": int(rng.integers(40, 100)),
        "hidden_size": int(rng.integers(5, 40)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "expand": int(rng.integers(1, 4)),
        "state_size": int(rng.integers(2, 12)),
        "conv_kernel": int(rng.integers(2, 6)),
        "time_step_rank": int(rng.integers(1, 7)) if flip(rng) else "auto",
        "use_bias": flip(rng),
        "use_conv_bias": flip(rng),
        "layer_norm_epsilon": float(rng.choice([1e-6, 1e-5, 1e-3])),
        "residual_in_fp32": flip(rng),
        "tie_word_embeddings": flip(rng),
    }


def mamba2(rng: Generator) -> PretrainedConfig:
    expand, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    heads, each = groups * int(rng.integers(1, 4)), int(rng.integers(2, 5))
    limit = [float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.5, 2.0))]
    return transformers.Mamba2Config(
        vocab_size=int(rng.integers(40, 100)),
        hidden_size=heads * each,
        num_hidden_layers=int(rng.integers(1, 4)),
        expand=expand,
        num_heads=heads,
        head_dim=each * expand,
        n_groups=groups,
        state_size=int(rng.integers(2, 12)),
        conv_kernel=int(rng.integers(2, 6)),
        chunk_size=int(rng.choice([4, 16, 32])),
        time_step_limit=limit if flip(rng) else [0.0, float("inf")],
        use_bias=flip(rng),
        use_conv_bias=flip(rng),
        layer_norm_epsilon=float(rng.choice([1e-6, 1e-5, 1e-3])),
        residual_in_fp32=flip(rng),
        tie_word_embeddings=flip(rng),
    )


def jamba(rng: Generator) -> PretrainedConfig:
    options, experts = decoder(rng), int(rng.integers(1, 6))
    for name in ("head_dim", "rope_parameters"):  # it knows neither
        options.pop(name, None)
    attention, sparse = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    options["num_hidden_layers"] = int(rng.integers(max(2, sparse), 6))
    return transformers.JambaConfig(
        **options,
        attn_layer_period=attention,
        attn_layer_offset=int(rng.integers(attention)),
        expert_layer_period=sparse,
        expert_layer_offset=int(rng.integers(sparse)),
        num_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)),
        output_router_logits=experts > 1 and flip(rng),
        router_aux_loss_coef=0.02,
        mamba_expand=int(rng.integers(1, 4)),
        mamba_d_state=int(rng.integers(2, 12)),
        mamba_d_conv=int(rng.integers(2, 6)),
        mamba_dt_rank=int(rng.integers(1, 7)) if flip(rng) else "auto",
        mamba_conv_bias=flip(rng),
        mamba_proj_bias=flip(rng),
    )


def minimax(rng: Generator) -> PretrainedConfig:
    options, experts = decoder(rng), int(rng.integers(2, 7))
    depth = options["num_hidden_layers"] = int(rng.integers(1, 5))
    kinds = ["linear_attention", "full_attention"]
    factors = {}  # much kept and little added, or float32 itself is worse than the bar
    for part in ("linear_attn", "full_attn", "mlp"):
        factors[f"{part}_alpha_factor"] = float(rng.uniform(1.0, 3.0))
        factors[f"{part}_beta_factor"] = float(rng.uniform(0.3, 1.0))
    return transformers.MiniMaxConfig(
        **options,
        **factors,
        layer_types=[str(rng.choice(kinds)) for _ in range(depth)] if flip(rng) else None,
        block_size=int(rng.choice([4, 16, 256])),
        sliding_window=int(rng.integers(2, 20)) if flip(rng) else None,
        num_local_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)),
        output_router_logits=flip(rng),
        router_aux_loss_coef=0.02,
    )


CONFIGS: dict[str, Callable[[Generator], PretrainedConfig]] = {
    "llama": llama,
    "minimax": minimax,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "mamba": mamba,
    "falcon_mamba": falcon_mamba,
    "mamba2": mamba2,
    "jamba": jamba,
}
