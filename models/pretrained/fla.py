"""GLA and RetNet in flash-linear-attention's layout, pure or with some softmax attention."""

import math
from collections.abc import Iterator
from typing import Any

from ...layers.attention import AttentionConfig
from ...layers.gla import GLAConfig
from ...layers.mlp import MLPConfig
from ...layers.retention import RetentionConfig
from ..config import LMConfig
from ..pattern import parse, written
from .llama import MLP, attention_pieces, ends
from .options import Options
from .pieces import Piece, kernels

BUFFERS = r"model\.layers\.\d+\.attn\.rotary\.inv_freq"
MIXERS = {"gla": "gla", "retnet": "retention"}
CONFIGS = {"gla": GLAConfig, "retention": RetentionConfig}
ARCHITECTURES = {"gla": "GLAForCausalLM", "retnet": "RetNetForCausalLM"}
DEFAULTS = {
    "gla": {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "hidden_ratio": 4.0},
    "retnet": {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2.0},
}
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "gate", "o_proj": "out"}
DECAY = {"gk_proj.0": "decay_down", "gk_proj.1": "decay_up"}
# Which kernels run, what is kept for the backward pass, and a penalty on logits in training.
# fuse_norm also decides the name of a tensor, of which both are known.
WITHOUT_EFFECT = (
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "use_l2warp",
)


def read(o: Options) -> LMConfig:
    kind = o.text("model_type")
    width, depth = o.whole("hidden_size", 2048), o.count("num_hidden_layers", 24)
    o.skip(*WITHOUT_EFFECT)
    o.expect("hidden_act", "swish")
    o.expect("feature_map")
    o.expect("use_output_gate", True)
    o.expect("attnres_block_size")
    default, eps, conv = DEFAULTS[kind], o.number("norm_eps", 1e-6, least=0.0), _conv(o)
    mixer: dict[str, Any] = {
        "heads": o.whole("num_heads", default["num_heads"]),
        "kv_heads": o.whole("num_kv_heads", None),
        "key_ratio": _inner(o, "expand_k", default["expand_k"], width) / width,
        "value_ratio": _inner(o, "expand_v", default["expand_v"], width) / width,
        "conv": conv,
        "norm_scale": o.flag("elementwise_affine", True),
        "norm_eps": eps,
    }
    if kind == "gla":
        o.expect("use_gk", True)
        o.expect("use_gv", False)
        mixer["decay_min"] = o.number("clamp_min", None)
    softmax, attention = _attention(o, depth)
    mixers = ["attention" if i in softmax else MIXERS[kind] for i in range(depth)]
    config = LMConfig(
        vocab=o.whole("vocab_size", 32000),
        width=width,
        depth=depth,
        pattern=written([f"{mixer}+swiglu" for mixer in mixers]),
        norm_eps=eps,
        tie_head=o.flag("tie_word_embeddings", False),
        mlp=MLPConfig(hidden=_hidden(o, width, default["hidden_ratio"])),
        attention=attention,
        **{MIXERS[kind]: CONFIGS[MIXERS[kind]](**mixer)},
    )
    return config


def _conv(o: Options) -> int:
    """Taps of the short convolutions."""
    size = o.whole("conv_size", 4)
    if not o.flag("use_short_conv", False):
        o.skip("share_conv_kernel")
        return 0
    o.expect("share_conv_kernel", False)
    return size


def _inner(o: Options, name: str, default: float, width: int) -> int:
    """The width of all heads together; `name` is its ratio to the model's, rounded down."""
    size = int(width * o.number(name, default))
    if not 0 < size <= o.most:
        raise ValueError(
            f"config.json: {name}={o.values.get(name, default)} with a width of {width}"
        )
    return size


def _ratio(width: int, ratio: float) -> float:
    """A ratio that gives our width when it is rounded down."""
    size = round(width * ratio)
    near = size / width
    return near if int(width * near) == size else math.nextafter(near, math.inf)


def _hidden(o: Options, width: int, ratio: float) -> int:
    """Without a size, 2/3 of hidden_ratio times the width, up to a multiple of 256."""
    ratio, size = o.number("hidden_ratio", ratio), o.whole("intermediate_size", None)
    if size is None:
        size = -(-int(width * ratio * 2 / 3) // 256) * 256
        if not 0 < size <= o.most:
            raise ValueError(f"config.json: hidden_ratio={ratio} with a width of {width}")
    return size


def _attention(o: Options, depth: int) -> tuple[list[int], AttentionConfig]:
    """The layers of softmax attention instead, and what they are."""
    attn = o.mapping("attn", None)
    if not attn.values:
        return [], AttentionConfig()
    layers = attn.each("attn.layers")
    if not all(type(i) is int and 0 <= i < depth for i in layers):
        raise ValueError(f"config.json: attn.layers={str(layers)[:80]} are not layers of {depth}")
    attn.expect("attn.qk_norm", False)
    attention = AttentionConfig(
        heads=attn.whole("attn.num_heads"),
        kv_heads=attn.whole("attn.num_kv_heads", None),
        window=attn.whole("attn.window_size", None, most=2**31),
        rope_base=attn.number("attn.rope_theta", 10000.0, least=1.0),
        bias=attn.flag("attn.qkv_bias", False),
    )
    attn.done()
    return layers, attention


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    mixer = getattr(config, MIXERS[kind])
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "expand_k": _ratio(config.width, mixer.key_ratio),
        "expand_v": _ratio(config.width, mixer.value_ratio),
        "feature_map": None,
        "use_short_conv": mixer.conv > 0,
        "conv_size": mixer.conv or 4,
        "share_conv_kernel": False,
        "use_output_gate": True,
        "elementwise_affine": mixer.norm_scale,
        "norm_eps": config.norm_eps,
        "fuse_norm": True,
        "hidden_act": "swish",
        "intermediate_size": config.mlp.width(config.width),
        "attn": _attention_options(config),
        "tie_word_embeddings": config.tie_head,
    }
    if kind == "gla":
        values |= {"clamp_min": mixer.decay_min, "use_gk": True, "use_gv": False}
    return values


def _attention_options(config: LMConfig) -> dict[str, Any] | None:
    kinds, attention = parse(config.pattern, config.depth), config.attention
    layers = [i for i, kind in enumerate(kinds) if kind.mixer == "attention"]
    if not layers:
        return None
    return {
        "layers": layers,
        "num_heads": attention.heads,
        "num_kv_heads": attention.kv_heads or attention.heads,
        "qkv_bias": attention.bias,
        "window_size": attention.window,
        "rope_theta": attention.rope_base,
    }


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield from ends(config, "model.embeddings")
    for i, block in enumerate(parse(config.pattern, config.depth)):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        yield Piece(f"{at}attn_norm.weight", f"{to}mixer_norm.scale")
        if block.mixer == "attention":
            yield from attention_pieces(f"{at}attn.", f"{to}mixer.", config.attention)
        else:
            yield from _mixer(f"{at}attn.", f"{to}mixer.", getattr(config, block.mixer))
        yield Piece(f"{at}mlp_norm.weight", f"{to}mlp_norm.scale")
        yield from kernels(f"{at}mlp.", f"{to}mlp.", MLP)


def _mixer(at: str, to: str, mixer: GLAConfig | RetentionConfig) -> Iterator[Piece]:
    yield from kernels(at, to, PROJECTIONS)
    for name in "qkv" if mixer.conv else "":
        yield Piece(f"{at}{name}_conv1d.weight", f"{to}conv.{name}.kernel", "conv")
    if isinstance(mixer, GLAConfig):
        yield from kernels(at, to, DECAY)
        yield Piece(f"{at}gk_proj.1.bias", f"{to}decay_up.bias")
    if mixer.norm_scale:  # its name depends on fuse_norm
        norm = f"{at}g_norm_swish_gate.weight", f"{at}g_norm.weight"
        yield Piece(norm[0], f"{to}norm.scale", other=norm[1])
