"""GLA and RetNet give flash-linear-attention's numbers, and TransNormerLLM its authors'."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from scanax.layers.gla import GLAConfig
from scanax.layers.lightning import LightningConfig
from scanax.layers.mlp import MLPConfig
from scanax.layers.retention import RetentionConfig
from scanax.models import LMConfig
from support.parity import Case, Laws, config_of

PADDING = 5


def fla(disk):
    """The fields that flash-linear-attention's two models have in common."""
    ratios = {"key_ratio": disk["expand_k"], "value_ratio": disk["expand_v"]}
    mixer = ratios | {"heads": disk["num_heads"], "norm_eps": disk["norm_eps"]}
    return mixer, {
        "vocab": disk["vocab_size"],
        "width": disk["hidden_size"],
        "depth": disk["num_hidden_layers"],
        "norm_eps": disk["norm_eps"],
        "tie_head": disk["tie_word_embeddings"],
        "mlp": MLPConfig(hidden=disk["intermediate_size"]),
    }


def gla(disk):
    mixer, model = fla(disk)
    return LMConfig(pattern="gla+swiglu", gla=GLAConfig(**mixer), **model)


def retnet(disk):
    mixer, model = fla(disk)
    return LMConfig(pattern="retention+swiglu", retention=RetentionConfig(**mixer), **model)


def transnormer(disk):
    return LMConfig(
        pattern="lightning+glu",
        vocab=disk["vocab_size"],
        width=disk["decoder_embed_dim"],
        depth=disk["decoder_layers"],
        norm="simple",
        norm_eps=1e-6,
        tie_head=False,
        embed_scale=not disk["no_scale_embedding"],
        mlp=MLPConfig(hidden=disk["glu_dim"]),
        lightning=LightningConfig(
            heads=disk["decoder_attention_heads"], lrpe_layers=sum(disk["linear_use_lrpe_list"])
        ),
    )


FLA = {
    "model.embeddings.weight": "embedding",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "head.kernel",
    "attn_norm.weight": "mixer_norm.scale",
    "attn.q_proj.weight": "mixer.q.kernel",
    "attn.k_proj.weight": "mixer.k.kernel",
    "attn.v_proj.weight": "mixer.v.kernel",
    "attn.g_proj.weight": "mixer.gate.kernel",
    "attn.o_proj.weight": "mixer.out.kernel",
    "attn.gk_proj.0.weight": "mixer.decay_down.kernel",
    "attn.gk_proj.1.weight": "mixer.decay_up.kernel",
    "attn.gk_proj.1.bias": "mixer.decay_up.bias",
    "attn.g_norm_swish_gate.weight": "mixer.norm.scale",
    "mlp_norm.weight": "mlp_norm.scale",
    "mlp.gate_proj.weight": "mlp.gate.kernel",
    "mlp.up_proj.weight": "mlp.up.kernel",
    "mlp.down_proj.weight": "mlp.down.kernel",
}
TRANSNORMER = {
    "model.embed_tokens.weight": "embedding",
    "lm_head.weight": "head.kernel",
    "token_mixer.qkvu_proj.weight": "mixer.q,k,v,gate.kernel",
    "token_mixer.out_proj.weight": "mixer.out.kernel",
    "token_mixer.lrpe.theta": "mixer.theta",
    "channel_mixer.l1.weight": "mlp.gate.kernel",
    "channel_mixer.l2.weight": "mlp.up.kernel",
    "channel_mixer.l3.weight": "mlp.down.kernel",
}
CASES = {  # config, names on disk, and the bars of logits and of left-padded logits
    "fla_gla": (gla, FLA, 5e-6, 5e-6),
    "fla_retnet": (retnet, FLA, 5e-6, 1e-5),
    "transnormer": (transnormer, TRANSNORMER, 3e-6, 3e-6),
}


def translate(names, tensors):
    """Tensors by their names on disk as the flat layout of a checkpoint."""
    flat = {}
    for name, x in tensors.items():
        where, layer = "", name.split("layers.")
        if len(layer) == 2:
            number, name = layer[1].split(".", 1)
            where = f"layers.{number}."
        ours = names[name]
        if ours.endswith("kernel"):
            x = x.T
        if ours.endswith("theta"):
            x = x[:, 0]
        if "," not in ours:
            flat[where + ours] = x
            continue
        head, roles, tail = ours.split(".")
        parts = np.split(x, len(roles.split(",")), axis=1)
        for role, part in zip(roles.split(","), parts, strict=True):
            flat[f"{where}{head}.{role}.{tail}"] = part
    return flat


def state_of(name, stored, ours, count):
    (S,) = stored.values()
    return [(ours["S"], S.swapaxes(2, 3) if name == "fla_gla" else S)]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    name = request.param
    make, names, *bars = CASES[name]
    named = partial(translate, names), partial(state_of, name)
    case = Case(name, make(config_of(name)), *named, *bars)
    # these were recorded in float32 only, and TransNormerLLM's new ids without a cache
    stored = dict(case.expected)
    case.expected = stored | {"logits_fp64": stored["logits"]}
    case.expected.setdefault("greedy_cached", stored.get("greedy_full"))
    if name == "transnormer":  # no left padding was recorded: the row alone stands for it
        none = jnp.zeros(case.tokens.shape, bool)
        alone, _ = case.step(jnp.roll(case.tokens, -PADDING, axis=1), case.empty, none)
        logits = case.expected["logits"].copy()
        logits[0, PADDING:] = alone[0, :-PADDING]
        case.expected["logits_leftpad5_row0"] = logits
    return case


class TestLinearAttention(Laws):
    pass
