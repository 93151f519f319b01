"""What a block adds to the residual stream, by every kind of mixer and MLP."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from scanax.layers.norm import rms_norm
from scanax.models import LMConfig, ResidualConfig
from scanax.models.block import Block
from scanax.models.pattern import parse
from support.compare import close

FACTORS = {"linear": (1.2, 0.9), "attention": (1.3, 0.7), "mlp": (1.1, 0.8)}
CONFIG = LMConfig(
    width=16, depth=3, pattern="gla+gelu,attention+glu,aaren", residual=ResidualConfig(**FACTORS)
)


def blocks(config):
    """Each kind of block with its factors, and a stream for it."""
    x = jax.random.normal(jax.random.key(1), (2, 9, config.width), jnp.float32)
    for layer, kind in enumerate(parse(config.pattern, config.depth)):
        block = Block(config, kind, layer=layer, rngs=nnx.Rngs(0))
        yield block, "attention" if kind.mixer == "attention" else "linear", 3 + x


@pytest.mark.parametrize("normed", [False, True])
def test_a_sum_is_weighed_by_what_is_added(normed):
    residual = dataclasses.replace(CONFIG.residual, normed=normed)
    for block, name, x in blocks(dataclasses.replace(CONFIG, residual=residual)):
        y, _, _ = block(x)
        parts = [(FACTORS[name], block.mixer_norm, block.mixer)]
        if block.mlp is not None:
            parts.append((FACTORS["mlp"], block.mlp_norm, block.mlp))
        for (alpha, beta), norm, part in parts:
            h = norm(x)
            added = part(h)
            added = added[0] if isinstance(added, tuple) else added  # a mixer returns its state
            x = alpha * (h if normed else x) + beta * added
        close(y, x, 1e-6)


def test_a_normed_stream_stays_in_float32():
    """What a bfloat16 block keeps of norm(x) is not rounded."""
    kept = ResidualConfig(normed=True, **dict.fromkeys(FACTORS, (1.5, 0.0)))
    config = dataclasses.replace(CONFIG, dtype="bfloat16", residual=kept)
    for block, _, x in blocks(config):
        y, _, _ = block(x)
        x = 1.5 * rms_norm(x, config.norm_eps)
        close(y, x if block.mlp is None else 1.5 * rms_norm(x, config.norm_eps), 1e-6)
        assert y.dtype == jnp.float32
    for block, _, x in blocks(dataclasses.replace(config, residual_float32=False)):
        assert block(x.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("residual", "pattern", "says"),
    [
        ({"linear": (2.0, 1.0)}, "attention+gelu", "residual.linear=.*no such part"),
        ({"attention": (1.0, 0.5)}, "gla,aaren+moe", "residual.attention=.*no such part"),
        ({"mlp": (1.0, 0.5)}, "gla,attention", "residual.mlp=.*no such part"),
        ({"mlp": (1.0, math.inf)}, "gla+gelu", "residual.mlp=.*must be finite"),
    ],
)
def test_factors_of_nothing_are_refused(residual, pattern, says):
    with pytest.raises(ValueError, match=says):
        LMConfig(pattern=pattern, residual=ResidualConfig(**residual))
