"""Families of published layouts by themselves: linear attention, RetNet, MiniMax-01."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from scanax.layers import AttentionConfig, GLAConfig, LightningConfig, MLPConfig, RetentionConfig
from scanax.models import LM, LMConfig
from scanax.models.pretrained import UncheckedWarning, load_pretrained, save_pretrained
from support.compare import close
from support.parity import CASES

STORED = {"fla_gla": 5e-6, "fla_retnet": 5e-6, "transnormer": 3e-6, "minimax": 3e-6}
TOKENS = np.random.default_rng(0).integers(50, size=(2, 19))


def logits(model, tokens=TOKENS):
    return nnx.jit(lambda model, tokens: model(tokens)[0])(model, jnp.asarray(tokens, jnp.int32))


def unchecked(folder):
    with pytest.warns(UncheckedWarning):  # others write no checksums
        return load_pretrained(folder)


def drawn(config):
    """A model of which every parameter shows in the logits, those that start at 1 or 0 as well."""
    model = LM(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape, x.dtype),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, params)
    return model


def options(folder):
    return json.loads((folder / "config.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def store(folder, values, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", STORED)
def test_a_stored_case_is_read_and_written(name, tmp_path):
    folder = CASES / name
    tokens = np.load(folder / "inputs.npz")["input_ids"]
    model = unchecked(folder)
    ours = logits(model, tokens)
    close(ours, np.load(folder / "expected.npz")["logits"], STORED[name])
    save_pretrained(model, tmp_path / "ours")
    close(logits(load_pretrained(tmp_path / "ours"), tokens), ours, 0.0)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours"))
    assert after.keys() == before.keys()
    for tensor in before:
        if not tensor.endswith("_decay"):  # over blocks of tokens; of 256 in ours
            close({tensor: after[tensor]}, {tensor: before[tensor]}, 1e-6)


def model(**changes):
    return LMConfig(
        **{"vocab": 50, "width": 16, "depth": 2, "norm_eps": 1e-6, "mlp": MLPConfig(hidden=24)}
        | changes
    )


GLA = {
    "kv heads, convolutions, decays bounded": GLAConfig(
        heads=4, kv_heads=2, conv=3, decay_min=-0.03
    ),
    "widths, no scale": GLAConfig(heads=3, key_ratio=9 / 16, value_ratio=33 / 16, norm_scale=False),
}
NAMES = [f"attn.{name}_proj" for name in "qkvgo"] + ["attn_norm", "mlp_norm"]
NAMES += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
CONVS = ["attn.q_conv1d", "attn.k_conv1d", "attn.v_conv1d"]


def fla_names(config):
    """Those of a model of two layers, without `.weight`."""
    mixer = config.gla if config.pattern.startswith("gla") else config.retention
    names = {"model.embeddings", "model.norm"} | ({"lm_head"} if not config.tie_head else set())
    each = NAMES + (CONVS if mixer.conv else [])
    each += ["attn.g_norm_swish_gate"] if mixer.norm_scale else []
    each += ["attn.gk_proj.0", "attn.gk_proj.1"] if mixer is config.gla else []
    return names | {f"model.layers.{i}.{name}" for i in range(2) for name in each}


@pytest.mark.parametrize("kind", ["gla", "retnet"])
@pytest.mark.parametrize("variant", GLA)
def test_variants_of_fla(kind, variant, tmp_path):
    gla = GLA[variant]
    config = model(gla=gla, tie_head=gla.norm_scale)
    if kind == "retnet":
        widths = {} if gla.norm_scale else {"key_ratio": 1.5}
        shared = {name: getattr(gla, name) for name in ("kv_heads", "conv", "norm_scale")}
        retention = RetentionConfig(heads=gla.heads, value_ratio=gla.value_ratio, **shared | widths)
        config = model(pattern="retention+swiglu", retention=retention, tie_head=config.tie_head)
    mine = drawn(config)
    save_pretrained(mine, tmp_path / "ours", family=kind)
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert {n.removesuffix(".weight") for n in names if not n.endswith("bias")} == fla_names(config)
    close(logits(load_pretrained(tmp_path / "ours")), logits(mine), 0.0)


def test_fla_with_softmax_attention(tmp_path):
    attention = AttentionConfig(heads=4, kv_heads=2, window=5, rope_base=100.0, bias=True)
    config = model(pattern="gla+swiglu,attention+swiglu", gla=GLAConfig(heads=2))
    mine = drawn(dataclasses.replace(config, attention=attention))
    save_pretrained(mine, tmp_path / "ours", family="gla")
    assert options(tmp_path / "ours")["attn"] == {
        "layers": [1],
        "num_heads": 4,
        "num_kv_heads": 2,
        "qkv_bias": True,
        "window_size": 5,
        "rope_theta": 100.0,
    }
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    second = {n.removeprefix("model.layers.1.attn.") for n in names if "layers.1.attn." in n}
    both = {f"{x}_proj.{part}" for x in "qkv" for part in ("weight", "bias")}
    assert second == both | {"o_proj.weight"}
    close(logits(load_pretrained(tmp_path / "ours")), logits(mine), 0.0)


def test_fla_as_older_files_have_it(tmp_path):
    """Another name of the norm, no size of the MLP, and options left to their defaults."""
    mine = drawn(model(gla=GLAConfig(heads=4), tie_head=False, mlp=MLPConfig(hidden=256)))
    save_pretrained(mine, tmp_path / "ours", family="gla")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    tensors = {n.replace("g_norm_swish_gate", "g_norm"): x for n, x in tensors.items()}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    older = {"fuse_norm": False, "intermediate_size": None, "share_conv_kernel": True}
    folder = store(tmp_path / "older", {"model_type": "gla"} | sizes | older, tensors)
    close(logits(unchecked(folder)), logits(mine), 0.0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def silu(x):
    return x / (1 + np.exp(-x))


def torchscale(o, w, ids):
    """RetNet's parallel form in float64, its decay matrix written out, rows rescaled as there."""
    heads, eps = o["decoder_retention_heads"], o["layernorm_eps"]
    time = np.arange(ids.shape[1])

    def norm(x, scale=1.0):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale

    def split(x):  # (B, H, T, features)
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    def turn(x):
        pairs = x.shape[-1] // 2
        angle = time[:, None] * 10000.0 ** -np.linspace(0, 1, pairs)
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    gamma = 1 - 2.0 ** (-5 - np.arange(heads))
    apart = time[:, None] - time
    D = np.where(apart >= 0, gamma[:, None, None] ** np.maximum(apart, 0), 0)
    D = D / np.sqrt(D.sum(-1, keepdims=True))
    x = w["embed_tokens"][ids]
    if not o["no_scale_embedding"]:
        x = x * o["decoder_embed_dim"] ** 0.5
    for i in range(o["decoder_layers"]):
        a = {n.removeprefix(f"layers.{i}."): m for n, m in w.items()}
        h = norm(x, a["retention_layer_norm"])
        q, k, v = (split(h @ a[f"retention.{name}_proj"].T) for name in "qkv")
        scores = turn(q) @ turn(k * k.shape[-1] ** -0.5).swapaxes(-1, -2) * D
        scores = scores / np.clip(np.abs(scores).sum(-1, keepdims=True), 1, 5e4)
        y = norm(scores @ v).swapaxes(1, 2).reshape(*ids.shape, -1)
        x = x + (silu(h @ a["retention.g_proj"].T) * y) @ a["retention.out_proj"].T
        h = norm(x, a["final_layer_norm"])
        act = {"gelu": gelu, "swish": silu}[o["activation_fn"]]
        x = x + (act(h @ a["ffn.fc1"].T) * (h @ a["ffn.gate"].T)) @ a["ffn.fc2"].T
    return norm(x, w["layer_norm"]) @ w.get("output_projection", w["embed_tokens"]).T


TORCHSCALE = {
    "decoder_embed_dim": 24,
    "decoder_value_embed_dim": 36,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 20,
    "decoder_layers": 2,
    "layernorm_eps": 1e-6,
    "vocab_size": 50,
}


def torchscale_weights(o):
    width, value, inner = o["decoder_embed_dim"], o["decoder_value_embed_dim"], 20
    shapes = {"embed_tokens": (50, width), "layer_norm": (width,)}
    if not o["share_decoder_input_output_embed"]:
        shapes["output_projection"] = (50, width)
    rows = {"q": width, "k": width, "v": value, "g": value}
    layer = {f"retention.{name}_proj": (size, width) for name, size in rows.items()} | {
        "retention.out_proj": (width, value),
        "retention_layer_norm": (width,),
        "final_layer_norm": (width,),
        "ffn.fc1": (inner, width),
        "ffn.gate": (inner, width),
        "ffn.fc2": (width, inner),
    }
    shapes |= {f"layers.{i}.{n}": s for i in range(o["decoder_layers"]) for n, s in layer.items()}
    rng = np.random.default_rng(5)
    return {
        name: ((len(shape) == 1) + 0.3 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("activation", "scaled", "tied"),
    [("gelu", True, False), ("swish", False, False), ("gelu", False, True)],
)
def test_torchscale(activation, scaled, tied, tmp_path):
    values = TORCHSCALE | {
        "activation_fn": activation,
        "no_scale_embedding": not scaled,
        "share_decoder_input_output_embed": tied,
        "decoder_normalize_before": True,
        "subln": True,
        "chunkwise_recurrent": True,
        "dropout": 0.0,
        "moe_freq": 0,
    }
    weights = torchscale_weights(values)
    angle = np.repeat(10000.0 ** -np.linspace(0, 1, 4), 2)
    rel_pos = {"angle": angle, "decay": np.log(1 - 2.0 ** (-5 - np.arange(3)))}
    tensors = {f"{name}.weight": x for name, x in weights.items()}
    tensors |= {f"retnet_rel_pos.{n}": x.astype(np.float32) for n, x in rel_pos.items()}
    if tied:
        tensors["output_projection.weight"] = tensors["embed_tokens.weight"].copy()
    mine = unchecked(store(tmp_path / "theirs", values, tensors))
    exact = {name: x.astype(np.float64) for name, x in weights.items()}
    close(logits(mine), torchscale(values, exact, TOKENS), 1e-5)
    save_pretrained(mine, tmp_path / "ours", family="torchscale")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == tensors.keys() - ({"output_projection.weight"} if tied else set())
    close(ours, {name: tensors[name] for name in ours}, 1e-6)
    assert options(tmp_path / "ours")["model_type"] is None
    close(logits(load_pretrained(tmp_path / "ours")), logits(mine), 0.0)


def test_a_head_that_is_said_to_be_tied(tmp_path):
    values = TORCHSCALE | {"share_decoder_input_output_embed": True}
    tensors = {f"{name}.weight": x for name, x in torchscale_weights(values).items()}
    other = tensors | {"output_projection.weight": tensors["embed_tokens.weight"] + 1}
    folder = store(tmp_path / "theirs", values, other)
    with pytest.raises(ValueError, match=r"output_projection\.weight is embed_tokens\.weight, but"):
        load_pretrained(folder)


REFUSED = {
    "fla_gla": [
        {"use_gv": True},
        {"use_gk": False},
        {"feature_map": "relu"},
        {"hidden_act": "gelu"},
        {"use_output_gate": False},
        {"attnres_block_size": 2},
        {"expand_k": 0.0},
        {"intermediate_size": None, "hidden_ratio": 1e30},
        {"intermediate_size": None, "hidden_ratio": 0},
        {"use_short_conv": True, "share_conv_kernel": True},
        {"attn": {"layers": [2], "num_heads": 2}},
        {"attn": {"layers": [1], "num_heads": 2, "qk_norm": True}},
        {"attn": {"layers": [1], "num_heads": 2, "gated": True}},
        {"gate_logit_normalizer": 8},
    ],
    "fla_retnet": [{"use_gk": True}, {"feature_map": "relu"}, {"clamp_min": -1.0}],
    "transnormer": [
        {"norm_type": "layernorm"},
        {"bias": True},
        {"linear_act_fun": "elu"},
        {"linear_use_lrpe_list": [0, 1, 0]},
        {"linear_use_lrpe_list": [], "linear_use_lrpe": 1},
        {"hidden_dim": 30},
    ],
    "minimax": [
        {"hidden_act": "gelu"},
        {"rotary_dim": 4},
        {"layer_types": ["linear_attention"]},
        {"layer_types": ["sliding_attention"] * 4},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"router_jitter_noise": 0.1},
        {"shared_intermediate_size": 8},
    ],
    "torchscale": [
        {"deepnorm": True},
        {"moe_freq": 2},
        {"activation_fn": "relu"},
        {"dropout": 0.1},
        {"multiway": True},
        {"layernorm_embedding": True},
        {"decoder_normalize_before": False},
        {"no_output_layer": True},
        {"rel_pos_buckets": 32},
        {"use_glu": False},
    ],
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in REFUSED.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else list(value)[-1],
)
def test_options_that_are_refused_are_named(name, change, tmp_path):
    if name == "torchscale":
        values = TORCHSCALE | {"share_decoder_input_output_embed": False}
        tensors = {f"{n}.weight": x for n, x in torchscale_weights(values).items()}
    else:
        values, tensors = options(CASES / name), load_file(CASES / name / "model.safetensors")
    folder = store(tmp_path / "theirs", values | change, tensors)
    with pytest.raises(ValueError, match=rf"config\.json: .*\b{re.escape(list(change)[-1])}\b"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "config", "what"),
    [
        ("gla", model(gla=GLAConfig(heads=2, decay_rank=8)), "gla.decay_rank=8, not 16"),
        ("gla", model(gla=GLAConfig(heads=2, norm_eps=1e-5)), "gla.norm_eps"),
        ("retnet", model(), "blocks="),
        ("torchscale", model(pattern="retention+swiglu"), "retention.interleaved=False"),
        ("transnormer", model(pattern="lightning+glu"), "norm=rms, not simple"),
        ("minimax", model(pattern="lightning+swiglu"), "moe|residual.normed|blocks="),
    ],
)
def test_models_that_a_layout_has_no_words_for(family, config, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        save_pretrained(LM(config, rngs=nnx.Rngs(0)), tmp_path / "ours", family=family)
    assert not (tmp_path / "ours").exists()


def test_transnormer_whose_file_has_no_head(tmp_path):
    """As older transformers wrote it, where a config that says nothing means a tied head."""
    values, tensors = (read(CASES / "transnormer") for read in (options, weights))
    assert "tie_word_embeddings" not in values
    del tensors["lm_head.weight"]
    tied = unchecked(store(tmp_path / "one", values | {"linear_act_fun": "swish"}, tensors))
    assert tied.config.tie_head
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    two = unchecked(store(tmp_path / "two", values, tensors))
    assert not two.config.tie_head
    close(logits(tied), logits(two), 1e-6)
    del tensors["lm_head.weight"]
    store(tmp_path / "untied", values | {"tie_word_embeddings": False}, tensors)
    with pytest.raises(ValueError, match=r"missing tensors: lm_head\.weight"):
        load_pretrained(tmp_path / "untied")


def test_transnormer_of_other_widths(tmp_path):
    """Heads of a width of their own, LRPE in two layers, embeddings as they are."""
    config = model(
        depth=3,
        pattern="lightning+glu",
        norm="simple",
        tie_head=False,
        lightning=LightningConfig(heads=3, head_width=4, lrpe_layers=2),
    )
    mine = drawn(config)
    save_pretrained(mine, tmp_path / "ours", family="transnormer")
    assert options(tmp_path / "ours")["linear_use_lrpe_list"] == [1, 1, 0]
    shapes = {n: x.shape for n, x in load_file(tmp_path / "ours" / "model.safetensors").items()}
    at = "model.layers.1.token_mixer"
    assert shapes[f"{at}.qkvu_proj.weight"] == (48, 16)
    assert shapes[f"{at}.lrpe.theta"] == (3, 1, 4)
    close(logits(load_pretrained(tmp_path / "ours")), logits(mine), 0.0)
