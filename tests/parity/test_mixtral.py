"""Routed experts, and the loss that evens their load, against transformers' MixtralForCausalLM."""

import numpy as np
import pytest
from flax import nnx
from scanax.layers import AttentionConfig, MLPConfig, MoEConfig, RouterConfig
from scanax.layers.router import losses
from scanax.models import LM, LMConfig, merge, split
from support.compare import close
from support.parity import Case, Laws, cache_of, config_of, decoder, experts


def translate(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return decoder(theirs, 2) | experts(theirs, 2, 4)


@pytest.fixture(scope="module")
def case():
    their = config_of("mixtral")
    k = their["num_experts_per_tok"]
    config = LMConfig(
        vocab=their["vocab_size"],
        width=their["hidden_size"],
        depth=their["num_hidden_layers"],
        pattern="attention+moe",
        norm_eps=their["rms_norm_eps"],
        tie_head=their["tie_word_embeddings"],
        mlp=MLPConfig(hidden=their["intermediate_size"]),
        # their share of an expert is k times ours
        moe=MoEConfig(
            experts=their["num_local_experts"],
            router=RouterConfig(
                top=k, balance=k * their["router_aux_loss_coef"], pooled=True, z=0.0
            ),
        ),
        attention=AttentionConfig(
            heads=their["num_attention_heads"],
            kv_heads=their["num_key_value_heads"],
            rope_base=their["rope_parameters"]["rope_theta"],
        ),
    )
    return Case("mixtral", config, translate, cache_of)


class TestMixtral(Laws):
    def test_the_loss_of_the_load(self, case):
        graphdef, _, rest = split(LM(case.config, rngs=nnx.Rngs(0)))
        _, _, aux = merge(graphdef, case.params, rest).hidden(case.tokens)
        added, _ = losses(case.config.moe.router, aux)
        close(added, 0.02 * case.expected["aux_loss"], 3e-6)
