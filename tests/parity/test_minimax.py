"""Lightning attention, softmax attention and a normed stream against transformers' MiniMax-01."""

import numpy as np
import pytest
from scanax.layers import AttentionConfig, LightningConfig, MLPConfig, MoEConfig, RouterConfig
from scanax.models import LMConfig, ResidualConfig
from support.parity import Case, Laws, cache_of, config_of, decoder, experts

HEADS, LAYERS, EXPERTS = 4, 4, 4


def translate(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A linear layer's q, k and v lie together, head by head."""
    theirs, linear = dict(theirs), {}
    for i in range(LAYERS):
        at, to = f"model.layers.{i}.self_attn.", f"layers.{i}.mixer."
        if f"{at}qkv_proj.weight" not in theirs:
            continue
        heads = theirs[f"{at}qkv_proj.weight"].reshape(
            HEADS, 3, -1, theirs["lm_head.weight"].shape[1]
        )
        for j, name in enumerate("qkv"):
            theirs[f"{at}{name}_proj.weight"] = heads[:, j].reshape(-1, heads.shape[-1])
        theirs[f"{at}o_proj.weight"] = theirs[f"{at}out_proj.weight"]
        linear[f"{to}gate.kernel"] = theirs[f"{at}output_gate.weight"].T
        linear[f"{to}norm.scale"] = theirs[f"{at}norm.weight"]
    return decoder(theirs, LAYERS) | linear | experts(theirs, LAYERS, EXPERTS)


def state_of(theirs: dict, ours: dict, count: int) -> list:
    if "linear_state" in theirs:
        return [(ours["S"], theirs["linear_state"])]
    return cache_of(theirs, ours, count)


@pytest.fixture(scope="module")
def case():
    their = config_of("minimax")
    heads = {"heads": their["num_attention_heads"], "head_width": their["head_dim"]}
    k, mixers = their["num_experts_per_tok"], {"linear": "lightning", "full": "attention"}

    def factors(part):
        return their[f"{part}_alpha_factor"], their[f"{part}_beta_factor"]

    config = LMConfig(
        vocab=their["vocab_size"],
        width=their["hidden_size"],
        depth=their["num_hidden_layers"],
        pattern=",".join(
            f"{mixers[kind.removesuffix('_attention')]}+moe" for kind in their["layer_types"]
        ),
        norm_eps=their["rms_norm_eps"],
        tie_head=their["tie_word_embeddings"],
        residual=ResidualConfig(
            normed=True,
            linear=factors("linear_attn"),
            attention=factors("full_attn"),
            mlp=factors("mlp"),
        ),
        mlp=MLPConfig(hidden=their["intermediate_size"]),
        moe=MoEConfig(
            experts=their["num_local_experts"],
            router=RouterConfig(
                top=k, balance=k * their["router_aux_loss_coef"], pooled=True, z=0.0
            ),
        ),
        lightning=LightningConfig(
            lrpe_layers=0,
            decay="minimax",
            silu_values=True,
            sigmoid_gate=True,
            norm_scale=True,
            norm_eps=1e-6,  # whatever rms_norm_eps is
            **heads,
        ),
        attention=AttentionConfig(
            kv_heads=their["num_key_value_heads"],
            rope_base=their["rope_parameters"]["rope_theta"],
            **heads,
        ),
    )
    return Case("minimax", config, translate, state_of)


class TestMiniMax(Laws):
    pass
