"""Mamba-2 against transformers' Mamba2ForCausalLM."""

import numpy as np
import pytest
from scanax.layers.mamba2 import Mamba2Config
from scanax.models import LMConfig
from support.parity import Case, Laws, config_of

INNER, GROUPS, STATE, HEADS = 64, 2, 16, 8


def translate(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused projections come apart by role: in_proj is z, x, B, C, dt; the convolution x, B, C."""
    ours = {
        "embedding": theirs["backbone.embeddings.weight"],
        "norm.scale": theirs["backbone.norm_f.weight"],
        "head.kernel": theirs["lm_head.weight"].T,
    }
    size = GROUPS * STATE
    for i in range(2):
        at = f"backbone.layers.{i}."
        mixer = {name.removeprefix(f"{at}mixer."): a for name, a in theirs.items() if at in name}
        z, x, B, C, dt = np.split(mixer["in_proj.weight"], np.cumsum([INNER, INNER, size, size]))
        layer = {
            "mixer_norm.scale": theirs[f"{at}norm.weight"],
            "mixer.z.kernel": z.T,
            "mixer.x.kernel": x.T,
            "mixer.B.kernel": B.T,
            "mixer.C.kernel": C.T,
            "mixer.dt.kernel": dt.T,
            "mixer.dt_bias": mixer["dt_bias"],
            "mixer.A_log": mixer["A_log"],
            "mixer.D": mixer["D"],
            "mixer.scale": mixer["norm.weight"],
            "mixer.out.kernel": mixer["out_proj.weight"].T,
        }
        for which in ("weight", "bias"):
            parts = np.split(mixer[f"conv1d.{which}"], [INNER, INNER + size])
            for role, part in zip("xBC", parts, strict=True):
                if which == "weight":
                    layer[f"mixer.{role}_conv.kernel"] = part[:, 0].T
                else:
                    layer[f"mixer.{role}_conv.bias"] = part
        ours |= {f"layers.{i}.{name}": array for name, array in layer.items()}
    return ours


def state_of(theirs, ours, count):
    """They keep the last 4 inputs of the convolution, of which the next token needs 3."""
    window = theirs["conv_states.0"].transpose(0, 2, 1)[:, 1:]
    windows = np.split(window, [INNER, INNER + GROUPS * STATE], axis=2)
    pairs = [(ours[f"{role}_conv"], w) for role, w in zip("xBC", windows, strict=True)]
    return [*pairs, (ours["S"], theirs["recurrent_states.0"].transpose(0, 1, 3, 2))]


@pytest.fixture(scope="module")
def case():
    their = config_of("mamba2")
    config = LMConfig(
        vocab=their["vocab_size"],
        width=their["hidden_size"],
        depth=their["num_hidden_layers"],
        pattern="mamba2",
        norm_eps=their["layer_norm_epsilon"],
        tie_head=their["tie_word_embeddings"],
        mamba2=Mamba2Config(
            expand=their["expand"],
            head_width=their["head_dim"],
            groups=their["n_groups"],
            state=their["state_size"],
            conv=their["conv_kernel"],
            bias=their["use_bias"],
            conv_bias=their["use_conv_bias"],
            norm_eps=their["layer_norm_epsilon"],
        ),
    )
    return Case("mamba2", config, translate, state_of)


class TestMamba2(Laws):
    pass
