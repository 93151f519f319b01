"""Mamba against transformers' MambaForCausalLM."""

import numpy as np
import pytest
from scanax.layers.mamba import MambaConfig
from scanax.models import LMConfig
from support.parity import Case, Laws, config_of


def translate(theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused projections come apart by role: in_proj is x, z and x_proj is dt, B, C."""
    ours = {
        "embedding": theirs["backbone.embeddings.weight"],
        "norm.scale": theirs["backbone.norm_f.weight"],
    }
    for i in range(2):
        at = f"backbone.layers.{i}."
        mixer = {name.removeprefix(f"{at}mixer."): a for name, a in theirs.items() if at in name}
        x, z = np.split(mixer["in_proj.weight"], 2)
        size, rank = mixer["A_log"].shape[1], mixer["dt_proj.weight"].shape[1]
        dt, B, C = np.split(mixer["x_proj.weight"], [rank, rank + size])
        layer = {
            "mixer_norm.scale": theirs[f"{at}norm.weight"],
            "mixer.x.kernel": x.T,
            "mixer.z.kernel": z.T,
            "mixer.conv.kernel": mixer["conv1d.weight"][:, 0].T,
            "mixer.conv.bias": mixer["conv1d.bias"],
            "mixer.dt_down.kernel": dt.T,
            "mixer.B.kernel": B.T,
            "mixer.C.kernel": C.T,
            "mixer.dt_up.kernel": mixer["dt_proj.weight"].T,
            "mixer.dt_bias": mixer["dt_proj.bias"],
            "mixer.A_log": mixer["A_log"],
            "mixer.D": mixer["D"],
            "mixer.out.kernel": mixer["out_proj.weight"].T,
        }
        ours |= {f"layers.{i}.{name}": array for name, array in layer.items()}
    return ours


def state_of(theirs, ours, count):
    """They keep the last 4 inputs of the convolution, of which the next token needs 3."""
    window = theirs["conv_states.0"].transpose(0, 2, 1)[:, 1:]
    return [(ours["conv"], window), (ours["S"], theirs["recurrent_states.0"])]


@pytest.fixture(scope="module")
def case():
    their = config_of("mamba")
    config = LMConfig(
        vocab=their["vocab_size"],
        width=their["hidden_size"],
        depth=their["num_hidden_layers"],
        pattern="mamba",
        norm_eps=their["layer_norm_epsilon"],
        tie_head=their["tie_word_embeddings"],
        mamba=MambaConfig(
            expand=their["expand"],
            state=their["state_size"],
            conv=their["conv_kernel"],
            dt_rank=their["time_step_rank"],
            bias=their["use_bias"],
            conv_bias=their["use_conv_bias"],
        ),
    )
    return Case("mamba", config, translate, state_of)


class TestMamba(Laws):
    pass
