"""Options of Mamba's families: released files are understood, and what is not is named."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from scanax.layers.attention import AttentionConfig
from scanax.layers.mamba import MambaConfig
from scanax.layers.mamba2 import Mamba2Config
from scanax.layers.mlp import MLPConfig
from scanax.layers.moe import MoEConfig
from scanax.layers.router import RouterConfig
from scanax.models import LM, LMConfig, by_layer, split
from scanax.models.pattern import parse
from scanax.models.pretrained import FAMILIES, load_pretrained, save_pretrained
from scanax.models.pretrained.compare import difference
from scanax.models.pretrained.options import Options

STEPS = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 0.0001}
BOTH = STEPS | {
    "conv_kernel": 4,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "num_hidden_layers": 64,
    "hidden_size": 4096,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "time_step_init_scheme": "random",
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "use_bias": False,
    "use_conv_bias": True,
    "use_cache": True,
}
RELEASED = {  # as their config.json has it, but for names and ids of tokens
    "state-spaces/mamba-130m-hf": BOTH
    | {
        "model_type": "mamba",
        "d_inner": 1536,
        "d_model": 768,
        "expand": 2,
        "fused_add_norm": True,
        "hidden_size": 768,
        "intermediate_size": 1536,
        "n_layer": 24,
        "num_hidden_layers": 24,
        "pad_vocab_size_multiple": 8,
        "rms_norm": True,
        "ssm_cfg": {},
        "state_size": 16,
        "time_step_rank": 48,
        "vocab_size": 50280,
    },
    "tiiuae/falcon-mamba-7b": BOTH
    | {
        "model_type": "falcon_mamba",
        "expand": 16,
        "intermediate_size": 8192,
        "state_size": 16,
        "tie_word_embeddings": False,
        "vocab_size": 65024,
    },
    "mistralai/Mamba-Codestral-7B-v0.1": BOTH
    | {
        "model_type": "mamba2",
        "chunk_size": 256,
        "expand": 2,
        "head_dim": 64,
        "intermediate_size": 8192,
        "n_groups": 8,
        "norm_before_gate": True,
        "num_heads": 128,
        "rms_norm": True,
        "state_size": 128,
        "tie_word_embeddings": False,
        "time_step_limit": [0.0, math.inf],
        "vocab_size": 32768,
    },
    "ai21labs/Jamba-v0.1": {
        "model_type": "jamba",
        "attention_dropout": 0.0,
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_dt_rank": 256,
        "mamba_expand": 2,
        "mamba_proj_bias": False,
        "num_attention_heads": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_logits_to_keep": 1,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_mamba_kernels": True,
        "vocab_size": 65536,
    },
}
NUMBERS = {  # of parameters, as published or as the sizes say
    "state-spaces/mamba-130m-hf": 129_135_360,
    "tiiuae/falcon-mamba-7b": 7_272_665_088,
    "mistralai/Mamba-Codestral-7B-v0.1": 7_285_403_648,
    "ai21labs/Jamba-v0.1": 51_570_323_328,
}


def read(values):
    asked = Options(values)
    config = FAMILIES[values["model_type"]].read(asked)
    asked.skip("model_type")
    asked.done()
    return config


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_number_of_parameters(name):
    model = nnx.eval_shape(lambda: LM(read(RELEASED[name]), rngs=nnx.Rngs(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(split(model)[1])) == NUMBERS[name]


def test_the_inner_width_counts_and_expand_does_not():
    config = read(RELEASED["tiiuae/falcon-mamba-7b"])
    assert config.mamba.expand == 2 and config.mamba.norm == "plain" and not config.tie_head


def test_jamba_has_attention_without_positions_and_experts_in_every_second_layer():
    config = read(RELEASED["ai21labs/Jamba-v0.1"])
    blocks = parse(config.pattern, config.depth)
    assert [i for i, b in enumerate(blocks) if b.mixer == "attention"] == [4, 12, 20, 28]
    assert [i for i, b in enumerate(blocks) if b.mlp == "moe"] == list(range(1, 32, 2))
    assert config.attention.rope_base is None and not config.moe.router.renormalize
    assert config.attention.kv_heads == 8
    null = {"num_key_value_heads": None}
    assert read(RELEASED["ai21labs/Jamba-v0.1"] | null).attention.kv_heads is None


@pytest.mark.parametrize(
    "name, change",
    [
        ("state-spaces/mamba-130m-hf", {"hidden_act": "gelu"}),
        ("state-spaces/mamba-130m-hf", {"n_layer": 48}),
        ("state-spaces/mamba-130m-hf", {"rms_norm": False}),
        ("state-spaces/mamba-130m-hf", {"ssm_cfg": {"layer": "Mamba2"}}),
        ("state-spaces/mamba-130m-hf", {"mixer_rms_eps": 1e-6}),
        ("state-spaces/mamba-130m-hf", {"time_step_rank": "half"}),
        ("tiiuae/falcon-mamba-7b", {"quantization_config": {"load_in_4bit": True}}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"num_heads": 100}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"n_groups": 3}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"time_step_limit": [1.0, 0.5]}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"time_step_limit": [math.nan, 1.0]}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"time_step_limit": [0, 10**400]}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"time_step_limit": [math.inf, math.inf]}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"expand": 0}),
        ("mistralai/Mamba-Codestral-7B-v0.1", {"expand": 1e308}),
        ("ai21labs/Jamba-v0.1", {"sliding_window": 4096}),
        ("ai21labs/Jamba-v0.1", {"mamba_inner_layernorms": False}),
        ("ai21labs/Jamba-v0.1", {"attention_dropout": 0.1}),
        ("ai21labs/Jamba-v0.1", {"attn_layer_period": 0}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(name, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        read(RELEASED[name] | change)


SMALL = {"vocab": 40, "width": 12, "depth": 3}
EXPERTS = MoEConfig(experts=3, router=RouterConfig(renormalize=False, balance=0.0, z=0.0))
JAMBA = {
    "mlp": MLPConfig(hidden=20),
    "moe": EXPERTS,
    "mamba": MambaConfig(state=3, dt_rank=2, norm="weighted", norm_eps=1e-5),
    "attention": AttentionConfig(heads=3, kv_heads=1, rope_base=None),
}
CONFIGS = {
    "mamba": LMConfig(**SMALL, pattern="mamba", mamba=MambaConfig(state=3, bias=True)),
    "falcon_mamba": LMConfig(
        **SMALL,
        pattern="mamba",
        tie_head=False,
        mamba=MambaConfig(expand=17 / 12, norm="plain", norm_eps=1e-3, conv_bias=False),
    ),
    "mamba2": LMConfig(
        **SMALL,
        pattern="mamba2",
        mamba2=Mamba2Config(head_width=4, groups=3, state=2, dt_limit=(0.1, 0.5), bias=True),
    ),
    "jamba": LMConfig(**SMALL, **JAMBA, pattern="mamba+swiglu,attention+moe,mamba+swiglu"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_round_trip_keeps_every_number(kind, tmp_path):
    model = LM(CONFIGS[kind], rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "it")
    again = load_pretrained(tmp_path / "it")
    assert f'"model_type": "{kind}"' in (tmp_path / "it" / "config.json").read_text()
    ours, theirs = (by_layer(m.config, split(m)[1]) for m in (model, again))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert difference(model.config, again.config) is None


@pytest.mark.parametrize(
    "config, why",
    [
        (LMConfig(**SMALL, **JAMBA, pattern="attention+moe,mamba+moe,mamba+swiglu"), "blocks="),
        (LMConfig(**SMALL, pattern="mamba+swiglu"), "mamba.norm=none"),
        (LMConfig(**SMALL, **JAMBA, pattern="mamba,attention"), "blocks="),
    ],
)
def test_a_model_that_jamba_cannot_say_is_refused(config, why, tmp_path):
    with pytest.raises(ValueError, match=f"jamba would be {why}"):
        model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
        save_pretrained(model, tmp_path / "it", family="jamba")
