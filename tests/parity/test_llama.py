"""Attention, SwiGLU and RMS norms against transformers' LlamaForCausalLM."""

import numpy as np
import pytest
from scanax.layers.attention import AttentionConfig
from scanax.layers.mlp import MLPConfig
from scanax.models import LMConfig
from support.parity import Case, Laws, cache_of, config_of, decoder

MLP = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}


def translate(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return decoder(theirs, 2, MLP)


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
    return Case("llama", config, translate, cache_of)


class TestLlama(Laws):
    pass
