"""Norms and MLPs are their equations, and start as published."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.depth import Depth
from scanax.layers.mlp import GELU, GLU, GeGLU, MLPConfig, SwiGLU
from scanax.layers.norm import LayerNorm, RMSNorm, SimpleRMSNorm
from support.compare import close


def moved(module):
    """The module with random parameters, and these in float64."""
    graph, params = nnx.split(module)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 1, p.shape), p.dtype), params)
    return nnx.merge(graph, params), jax.tree.map(np.float64, nnx.to_pure_dict(params))


def test_norms():
    x = 3 + jax.random.normal(jax.random.key(0), (2, 3, 4, 16), jnp.float32)
    exact = np.float64(x)
    mean, square = exact.mean(-1, keepdims=True), (exact**2).mean(-1, keepdims=True)
    rms = exact / np.sqrt(square + 0.1)
    centred = (exact - mean) / np.sqrt(exact.var(-1, keepdims=True) + 0.1)
    close(SimpleRMSNorm(0.1)(x), rms, 1e-6)
    norm, p = moved(RMSNorm(16, 0.1, rngs=nnx.Rngs(0)))
    close(norm(x), rms * p["scale"], 1e-6)
    norm, p = moved(LayerNorm(16, 0.1, rngs=nnx.Rngs(0)))
    close(norm(x), centred * p["scale"] + p["bias"], 1e-6)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_keep_statistics_in_float32_and_return_the_compute_dtype(kind):
    x = 100 + jax.random.normal(jax.random.key(0), (8, 512), jnp.float32)
    y = kind(512, 1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)
    assert y.dtype == jnp.bfloat16
    close(y.astype(jnp.float32), kind(512, 1e-6, rngs=nnx.Rngs(0))(x), 2**-8)


def test_mlps():
    x = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.float32)
    exact, config = np.float64(x), MLPConfig(hidden=24, bias=True)

    def project(p, name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    for kind, activate in ((GLU, lambda y: y), (SwiGLU, lambda y: y / (1 + np.exp(-y)))):
        mlp, p = moved(kind(16, config, rngs=nnx.Rngs(0)))
        inner = activate(project(p, "gate", exact)) * project(p, "up", exact)
        close(mlp(x), project(p, "down", inner), 1e-5)
    erf = np.vectorize(math.erf)
    gelu = {
        False: lambda y: y * (1 + erf(y / np.sqrt(2))) / 2,
        True: lambda y: y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2,
    }
    for tanh, activate in gelu.items():
        config = MLPConfig(hidden=24, bias=True, tanh=tanh)
        mlp, p = moved(GELU(16, config, rngs=nnx.Rngs(0)))
        close(mlp(x), project(p, "down", activate(project(p, "up", exact))), 1e-5)
        mlp, p = moved(GeGLU(16, config, rngs=nnx.Rngs(0)))
        inner = activate(project(p, "gate", exact)) * project(p, "up", exact)
        close(mlp(x), project(p, "down", inner), 1e-5)


def test_hidden_widths_are_rounded_up():
    assert [MLPConfig().width(w) for w in (24, 256, 1024)] == [64, 704, 2752]
    assert MLPConfig(ratio=4.0, multiple_of=1).width(768) == 3072
    assert MLPConfig(hidden=2816).width(1024) == 2816


def test_initial_values():
    mlp = SwiGLU(
        256, MLPConfig(scale_residual=True, hidden=1024), depth=Depth(branches=16), rngs=nnx.Rngs(0)
    )
    assert abs(float(mlp.up.kernel[...].std()) - 0.02) < 3e-4
    assert abs(float(mlp.down.kernel[...].std()) - 0.02 / 4) < 1e-4
    mlp = GELU(
        256, MLPConfig(init_std=None, hidden=1024), depth=Depth(branches=16), rngs=nnx.Rngs(0)
    )
    assert 0.99 / 16 < float(jnp.abs(mlp.up.kernel[...]).max()) <= 1 / 16
    assert 0.99 / 32 < float(jnp.abs(mlp.down.kernel[...]).max()) <= 1 / 32
