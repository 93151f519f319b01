"""Attention, SwiGLU and RMS norms against transformers' LlamaForCausalLM."""

import numpy as np
import pytest
from scanax.layers.attention import AttentionConfig
from scanax.layers.mlp import MLPConfig
from scanax.models import LMConfig
from support.parity import Case, Laws, config_of

LINEAR = {
    "self_attn.q_proj": "mixer.q",
    "self_attn.k_proj": "mixer.k",
    "self_attn.v_proj": "mixer.v",
    "self_attn.o_proj": "mixer.out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}


def translate(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ours = {
        "embedding": theirs["model.embed_tokens.weight"],
        "norm.scale": theirs["model.norm.weight"],
        "head.kernel": theirs["lm_head.weight"].T,
    }
    for i in range(2):
        at = f"model.layers.{i}."
        for their, name in LINEAR.items():
            ours[f"layers.{i}.{name}.kernel"] = theirs[f"{at}{their}.weight"].T
        for their, name in NORMS.items():
            ours[f"layers.{i}.{name}.scale"] = theirs[f"{at}{their}.weight"]
    return ours


def state_of(theirs, ours, count):
    pairs = (("k", "keys"), ("v", "values"))
    return [(ours[k][:, :count], theirs[name].transpose(0, 2, 1, 3)) for k, name in pairs]


@pytest.fixture(scope="module")
def case():
    their = config_of("llama")
    config = LMConfig(
        vocab=their["vocab_size"],
        width=their["hidden_size"],
        depth=their["num_hidden_layers"],
        pattern="attention+swiglu",
        norm_eps=their["rms_norm_eps"],
        tie_head=their["tie_word_embeddings"],
        mlp=MLPConfig(hidden=their["intermediate_size"], bias=their["mlp_bias"]),
        attention=AttentionConfig(
            heads=their["num_attention_heads"],
            kv_heads=their["num_key_value_heads"],
            head_width=their["head_dim"],
            rope_base=their["rope_parameters"]["rope_theta"],
            bias=their["attention_bias"],
            out_bias=their["attention_bias"],
        ),
    )
    return Case("llama", config, translate, state_of)


class TestLlama(Laws):
    pass
