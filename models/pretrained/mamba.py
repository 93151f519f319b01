"""Mamba and FalconMamba in transformers' layout."""

from collections.abc import Iterator
from typing import Any

from ...layers.mamba import MambaConfig, inner_width
from ..config import LMConfig
from .llama import ends
from .options import Options
from .pieces import Piece, fused, kernels

BUFFERS = r"(?!)"  # none
ARCHITECTURES = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}
# How training begins, and which implementation runs.
WITHOUT_EFFECT = (
    "fuse_cross_entropy",
    "fuse_norm",
    "fused_add_norm",
    "pad_vocab_size_multiple",  # vocab_size has been padded
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    "use_associative_scan",
    "use_falcon_mambapy",
    "use_mambapy",
)


def read(o: Options) -> LMConfig:
    width, depth = o.whole("hidden_size"), o.count("num_hidden_layers")
    o.skip("expand")  # which means nothing beside an intermediate_size
    inner = o.whole("intermediate_size", None) or expanded(o, "expand", width)
    falcon = o.text("model_type") == "falcon_mamba"
    eps = o.number("layer_norm_epsilon", 1e-5, least=0.0)
    o.expect("hidden_act", "silu", "swish")
    o.skip(*WITHOUT_EFFECT)
    older(o, width, depth, inner, eps)
    config = MambaConfig(
        expand=inner / width,
        state=o.whole("state_size", 16),
        conv=o.whole("conv_kernel", 4),
        dt_rank=rank(o, "time_step_rank"),
        bias=o.flag("use_bias", False),
        conv_bias=o.flag("use_conv_bias", True),
        norm="plain" if falcon else "none",
        norm_eps=o.number("mixer_rms_eps", 1e-6, least=0.0) if falcon else 1e-6,
    )
    return model(o, {"mamba": config}, width, depth, eps, tied=True)


def model(
    o: Options, mixer: dict[str, Any], width: int, depth: int, eps: float, tied: bool
) -> LMConfig:
    """A model of one mixer, by its name, and nothing else; `tied` is the head's default."""
    (pattern,) = mixer
    return LMConfig(
        vocab=o.whole("vocab_size"),
        width=width,
        depth=depth,
        pattern=pattern,
        norm_eps=eps,
        tie_head=o.flag("tie_word_embeddings", tied),
        residual_float32=o.flag("residual_in_fp32", True),
        **mixer,
    )


def expanded(o: Options, name: str, width: int) -> int:
    """The inner width by a multiple of the width, which need not be whole; 2 by default."""
    inner = o.number(name, 2.0) * width
    if not 1 <= inner <= o.most:
        raise ValueError(f"config.json: {name} x hidden_size={inner}, not of the files' sizes")
    return int(inner)


def rank(o: Options, name: str) -> int | None:
    """The rank of dt: a number, or "auto", which is our default too."""
    if o.values.get(name) != "auto":
        return o.whole(name, None)
    o.skip(name)
    return None


def older(o: Options, width: int, depth: int, inner: int, eps: float) -> None:
    """What the first files repeat by the names of the authors' own code."""
    for name, value in {"d_model": width, "n_layer": depth, "d_inner": inner}.items():
        o.expect(name, value)
    o.expect("norm_epsilon", eps)
    o.expect("rms_norm", True)
    o.expect("ssm_cfg", {})
    o.expect("initializer_cfg")


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    mamba, inner = config.mamba, inner_width(config.mamba, config.width)
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": inner,
        "expand": max(inner // config.width, 1),  # the line above counts
        "state_size": mamba.state,
        "conv_kernel": mamba.conv,
        "time_step_rank": mamba.dt_rank or -(-config.width // 16),
        "use_bias": mamba.bias,
        "use_conv_bias": mamba.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_float32,
        "tie_word_embeddings": config.tie_head,
    }
    return values | ({"mixer_rms_eps": mamba.norm_eps} if kind == "falcon_mamba" else {})


def multiple(expand: int | float) -> int | float:
    """Written without a point where it is whole, as the library wants it."""
    return int(expand) if expand == int(expand) else expand


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield from ends(config, "backbone.embeddings", "backbone.norm_f")
    for i in range(config.depth):
        at, to = f"backbone.layers.{i}.", f"layers.{i}."
        yield Piece(f"{at}norm.weight", f"{to}mixer_norm.scale")
        yield from mixer(f"{at}mixer.", f"{to}mixer.", config)


def mixer(at: str, to: str, config: LMConfig) -> Iterator[Piece]:
    """One Mamba mixer, without norms of dt, B and C."""
    mamba, inner = config.mamba, inner_width(config.mamba, config.width)
    low = mamba.dt_rank or -(-config.width // 16)
    yield from fused(f"{at}in_proj.weight", "T", [(f"{to}{n}.kernel", inner) for n in "xz"])
    if mamba.bias:
        yield from fused(f"{at}in_proj.bias", "same", [(f"{to}{n}.bias", inner) for n in "xz"])
    yield Piece(f"{at}conv1d.weight", f"{to}conv.kernel", "conv")
    if mamba.conv_bias:
        yield Piece(f"{at}conv1d.bias", f"{to}conv.bias")
    parts = {"dt_down": low, "B": mamba.state, "C": mamba.state}
    yield from fused(f"{at}x_proj.weight", "T", [(f"{to}{n}.kernel", r) for n, r in parts.items()])
    yield Piece(f"{at}dt_proj.weight", f"{to}dt_up.kernel", "T")
    yield Piece(f"{at}dt_proj.bias", f"{to}dt_bias")
    yield Piece(f"{at}A_log", f"{to}A_log")
    yield Piece(f"{at}D", f"{to}D")
    yield from kernels(at, to, {"out_proj": "out"}, mamba.bias)
