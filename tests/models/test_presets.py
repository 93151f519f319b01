"""Parameter counts of the presets against the published ones, without allocating any."""

import math

import jax
import pytest
from flax import nnx
from scanax.models import LM, PRESETS

# Mamba: closed formula of the released architecture, e.g. 129,135,360 for 130m (tied head,
# 50,277 ids padded to a multiple of 8). Depth and width: table 12 of arXiv:2312.00752.
MAMBA = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536)}
MAMBA |= {"1.4b": (48, 2048), "2.8b": (64, 2560)}
# Mamba-2: the released config.json files (50,277 ids padded to a multiple of 16, tied head).
MAMBA2 = {"130m": (24, 768), "370m": (48, 1024), "780m": (48, 1536)}
MAMBA2 |= {"1.3b": (48, 2048), "2.7b": (64, 2560)}


def count(name: str) -> int:
    model = nnx.eval_shape(lambda: LM(PRESETS[name], rngs=nnx.Rngs(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def nominal(size: str) -> float:
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


@pytest.mark.parametrize("size", MAMBA)
def test_mamba(size):
    layers, d = MAMBA[size]
    published = layers * (6.25 * d**2 + 111 * d) + d + 50280 * d
    assert count(f"mamba-{size}") == published
    assert size != "130m" or published == 129_135_360
    assert abs(published / nominal(size) - 1) < 0.025


@pytest.mark.parametrize("size", MAMBA2)
def test_mamba2(size):
    layers, d = MAMBA2[size]
    inner, heads, state = 2 * d, 2 * d // 64, 128
    projections = d * (2 * inner + 2 * state + heads) + inner * d
    convolution = (inner + 2 * state) * (4 + 1)
    published = layers * (projections + convolution + 3 * heads + inner + d) + d + 50288 * d
    assert count(f"mamba2-{size}") == published
    assert abs(published / nominal(size) - 1) < 0.035


def _llama_like(layers, d, mixer, hidden, vocab, tied):
    """Two norms and a SwiGLU a block, a last norm, embedding and head."""
    return layers * (mixer + 3 * d * hidden + 2 * d) + d + vocab * d * (1 if tied else 2)


@pytest.mark.parametrize(
    "size, d, hidden, tied", [("340m", 1024, 2816, True), ("1.3b", 2048, 5632, False)]
)
def test_gla(size, d, hidden, tied):
    """The released 340M (tied) and 1.3B (untied) checkpoints: 32,000 ids, MLPs of 8/3 d rounded up
    to 256. The paper's names are nominal: 1.3B is 1.366e9."""
    decay = 16 * d + 16 * d // 2 + d // 2
    mixer = 4 * d * d + decay + d // 4  # q, k of d/2; v, gate, out of d; one norm of a head
    published = _llama_like(24, d, mixer, hidden, 32000, tied)
    assert count(f"gla-{size}") == published
    assert abs(published / nominal(size) - 1) < 0.055


@pytest.mark.parametrize(
    "size, layers, d, hidden, file",
    # Bytes of the bfloat16 weight files on the model pages of the 1.3B and 2.7B checkpoints, as
    # shown there; no 6.7B weights are public, and its MLP follows the same rule.
    [
        ("1.3b", 24, 2048, 2816, 2.7e9),
        ("2.7b", 32, 2560, 3584, 4.99e9 + 0.457e9),
        ("6.7b", 32, 4096, 5632, None),
    ],
)
def test_retnet(size, layers, d, hidden, file):
    mixer = 8 * d * d + 512  # q, k of d; v, gate, out of 2d; one norm of a head
    published = _llama_like(layers, d, mixer, hidden, 32000, tied=False)
    assert count(f"retnet-{size}") == published
    assert abs(published / nominal(size) - 1) < 0.045
    # The paper's own blocks have 12 d^2 parameters (a GELU MLP of width 2d) and no public weights.
    assert abs(published / (12 * layers * d * d + 64000 * d) - 1) < 0.05
    if file is not None:
        assert abs(2 * published / file - 1) < 0.005


@pytest.mark.parametrize(
    "size, layers, d, hidden, vocab, percent",
    # 385M is exact to the million with the 50,272 ids of its released config; the names 1B and 7B
    # are nominal (the technical report gives 6.8 billion for the latter). MLP widths: released
    # configs for 385M and 1B; 7B's is the one that fits its reported size.
    [
        ("385m", 24, 1024, 2816, 50272, 0.1),
        ("1b", 16, 2048, 5632, 64000, 2.1),
        ("7b", 30, 4096, 11008, 64000, 2.4),
    ],
)
def test_tnl(size, layers, d, hidden, vocab, percent):
    # q, k, v, gate, out; a gated MLP; no norm has weights; theta of LRPE in block 0
    published = layers * (5 * d * d + 3 * d * hidden) + d + vocab * d
    assert count(f"tnl-{size}") == published
    assert abs(published / nominal(size) - 1) < percent / 100
    assert size != "7b" or abs(published / 6.8e9 - 1) < 0.006


def test_the_small_model_is_small():
    assert 1.4e6 < count("small") < 1.6e6
