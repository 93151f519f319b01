"""Any cut of a stream gives the same numbers, and documents do not see each other: every mixer."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from scanax.layers import laws
from scanax.layers.aaren import Aaren, AarenConfig
from scanax.layers.attention import Attention, AttentionConfig
from scanax.layers.gated_conv import GatedConv, GatedConvConfig
from scanax.layers.gla import GLA, GLAConfig
from scanax.layers.lightning import Lightning, LightningConfig
from scanax.layers.mamba import Mamba, MambaConfig
from scanax.layers.mamba2 import Mamba2, Mamba2Config
from scanax.layers.retention import Retention, RetentionConfig
from scanax.layers.vir import Vir, VirConfig
from support.compare import close

WIDTH = 16
MIXERS = {
    "gla": (GLA, GLAConfig(heads=2, conv=3)),
    "retention": (Retention, RetentionConfig(heads=2, conv=3)),
    "vir": (Vir, VirConfig(heads=2)),
    "lightning": (Lightning, LightningConfig(heads=2, lrpe_layers=2)),
    "mamba": (Mamba, MambaConfig(state=4)),
    "jamba": (Mamba, MambaConfig(state=4, dt_rank=3, norm="weighted", bias=True)),
    "time-invariant": (Mamba, MambaConfig(state=4, selective=False)),
    "mamba2": (Mamba2, Mamba2Config(head_width=8, groups=2, state=4)),
    "aaren": (Aaren, AarenConfig(heads=2)),
    "attention": (Attention, AttentionConfig(heads=4, kv_heads=2, bias=True)),
    "conv": (GatedConv, GatedConvConfig(init_std=0.3)),
    "windowed": (Attention, AttentionConfig(heads=2, window=4, head_width=6, rope_base=None)),
}


def trial(name, dtype=jnp.float32):
    mixer, config = MIXERS[name]
    return laws.Trial(partial(mixer, config=config), WIDTH, dtype)


@pytest.fixture(scope="module", params=MIXERS)
def case(request):
    return trial(request.param)


@pytest.mark.parametrize("law", laws.LAWS)
def test_every_mixer_obeys(law, case):
    pairs = list(laws.LAWS[law](case))
    assert pairs
    bar = 1e-6 if law == "not finite stays" else laws.BAR  # there the same numbers are met twice
    for actual, desired in pairs:
        close(actual, desired, bar)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_keeps_a_float32_state(name):
    low, high = trial(name, jnp.bfloat16), trial(name)
    for actual, desired in laws.state_is_a_carry(low):
        close(actual, desired, 0)
    y, state = low.run(low.x, None, low.none)
    full, _ = high.run(low.x.astype(jnp.float32), None, high.none)
    close(y.astype(jnp.float32), full, 0.03)
    for leaf in set(state or ()) & {"S", "m", "u", "w"}:
        assert state[leaf].dtype == jnp.float32
    for path, leaf in jax.tree.leaves_with_path(nnx.state(low.model)):
        assert leaf.dtype == jnp.float32, path
