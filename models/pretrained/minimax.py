"""MiniMax-01 in transformers' layout: lightning and softmax attention, experts, a normed stream."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...layers import decay
from ...layers.attention import AttentionConfig
from ...layers.lightning import LightningConfig
from ...layers.mlp import MLPConfig
from ..config import LMConfig, ResidualConfig
from ..pattern import parse, written
from .llama import (
    MIXTRAL,
    attention_pieces,
    ends,
    experts,
    mixtral,
    mixtral_options,
    norms,
    rope_base,
)
from .options import Options
from .pieces import Piece, kernels

BUFFERS = (
    r"model\.layers\.\d+\.self_attn\."
    r"(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)"
)
MIXERS = {"linear_attention": "lightning", "full_attention": "attention"}
PARTS = {"linear": "linear_attn", "attention": "full_attn", "mlp": "mlp"}
BLOCK = 256  # tokens of a block where their code runs in blocks; it is the default


def read(o: Options) -> LMConfig:
    depth, heads = o.whole("num_hidden_layers", 32), o.whole("num_attention_heads", 32)
    o.skip("block_size")
    o.expect("hidden_act", "silu")
    o.expect("attention_dropout", 0.0, 0)
    width, head = o.whole("hidden_size", 4096), o.whole("head_dim", None)
    o.expect("rotary_dim", head or width // heads)
    kinds = o.each("layer_types", [list(MIXERS)[(i + 1) % 2] for i in range(depth)])
    if len(kinds) != depth or not all(kind in list(MIXERS) for kind in kinds):
        raise ValueError(
            f"config.json: layer_types={kinds} is not supported; it can be {depth} of "
            f"{' and '.join(MIXERS)}"
        )
    mixers = [MIXERS[kind] for kind in kinds]
    return LMConfig(
        vocab=o.whole("vocab_size", 32000),
        width=width,
        depth=depth,
        pattern=written([f"{mixer}+moe" for mixer in mixers]),
        norm_eps=o.number("rms_norm_eps", 1e-5),
        tie_head=o.flag("tie_word_embeddings", False),
        residual=_residual(o, mixers),
        mlp=MLPConfig(hidden=o.whole("intermediate_size", 14336)),
        moe=mixtral(o),
        lightning=LightningConfig(
            heads=heads,
            head_width=head,
            lrpe_layers=0,
            decay="minimax",
            silu_values=True,
            sigmoid_gate=True,
            norm_scale=True,
            norm_eps=1e-6,  # whatever rms_norm_eps is
        ),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=o.whole("num_key_value_heads", 8),
            head_width=head,
            window=o.whole("sliding_window", None, most=2**31),
            rope_base=rope_base(o, 1e6),
        ),
    )


def _residual(o: Options, mixers: list[str]) -> ResidualConfig:
    """The factors; those of layers that the model does not have are of no effect."""
    found = {}
    for ours, theirs in PARTS.items():
        found[ours] = tuple(o.number(f"{theirs}_{name}_factor", 1.0) for name in ("alpha", "beta"))
    for ours, mixer in {"linear": "lightning", "attention": "attention"}.items():
        if mixer not in mixers:
            del found[ours]
    return ResidualConfig(normed=True, **found)


def write(config: LMConfig, kind: str) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in MIXERS.items()}
    mixers = [block.mixer for block in parse(config.pattern, config.depth)]
    main = config.lightning if "lightning" in mixers else config.attention
    values = {
        "architectures": ["MiniMaxForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.moe.hidden or config.mlp.width(config.width),
        "num_hidden_layers": config.depth,
        "num_attention_heads": main.heads,
        "num_key_value_heads": config.attention.kv_heads or config.attention.heads,
        "head_dim": main.head_width or config.width // main.heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.attention.window,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.attention.rope_base},
        "layer_types": [names.get(mixer, mixer) for mixer in mixers],
        "block_size": BLOCK,
        "tie_word_embeddings": config.tie_head,
        **mixtral_options(config.moe),
    }
    for ours, theirs in PARTS.items():
        alpha, beta = getattr(config.residual, ours)
        values |= {f"{theirs}_alpha_factor": alpha, f"{theirs}_beta_factor": beta}
    return values


def pieces(config: LMConfig, kind: str) -> Iterator[Piece]:
    yield from ends(config)
    for i, block in enumerate(parse(config.pattern, config.depth)):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        yield from norms(at, to)
        if block.mixer == "attention":
            yield from attention_pieces(f"{at}self_attn.", f"{to}mixer.", config.attention)
        else:
            yield from _lightning(f"{at}self_attn.", f"{to}mixer.", config)
        yield from experts(f"{at}block_sparse_moe.", f"{to}mlp.", config, MIXTRAL)


def _lightning(at: str, to: str, config: LMConfig) -> Iterator[Piece]:
    """A head's rows of q, k and v follow each other, then comes the next head."""
    heads = config.lightning.heads
    head = config.lightning.head_width or config.width // heads
    rows = np.arange(3 * heads * head).reshape(heads, 3, head)
    for j, name in enumerate("qkv"):
        yield Piece(f"{at}qkv_proj.weight", f"{to}{name}.kernel", "T", rows[:, j].ravel())
    yield from kernels(at, to, {"output_gate": "gate", "out_proj": "out"})
    yield Piece(f"{at}norm.weight", f"{to}norm.scale")


def buffers(config: LMConfig) -> dict[str, np.ndarray]:
    """Decays over blocks of tokens: to the start, from the end, and between tokens of one."""
    found = {}
    token = np.arange(BLOCK)
    apart = token[:, None] - token
    for i, block in enumerate(parse(config.pattern, config.depth)):
        if block.mixer == "attention":
            continue
        slope = -decay.lightning("minimax", config.lightning.heads, i, config.depth)[:, None, None]
        each = {
            "slope_rate": slope,
            "query_decay": np.exp(-slope * (token[:, None] + 1)),
            "key_decay": np.exp(-slope * (BLOCK - 1 - token[:, None])),
            "diagonal_decay": np.where(apart >= 0, np.exp(-slope * np.maximum(apart, 0)), 0)[None],
        }
        found |= {
            f"model.layers.{i}.self_attn.{name}": x.astype(np.float32) for name, x in each.items()
        }
    return found
