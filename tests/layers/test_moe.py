"""A mixture of experts is its equation: every expert on every token, weighted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import MLPConfig, MoE, MoEConfig, RouterConfig
from support.compare import close, rms

D, F, E = 8, 12, 5
erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "swiglu": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: y * (1 + erf(y / np.sqrt(2))) / 2,
    "relu": lambda y: np.maximum(y, 0),
}


def drawn(config, mlp, **options):
    """A layer with random parameters, and these in float64."""
    graph, params = nnx.split(MoE(D, config, mlp, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), params)
    return nnx.merge(graph, params), jax.tree.map(np.float64, nnx.to_pure_dict(params))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_equation(activation, bias):
    shared = 6 if activation == "swiglu" else 0
    config = MoEConfig(E, F, activation, shared=shared, shared_gate=bool(shared))
    layer, p = drawn(config, MLPConfig(bias=bias))
    x = np.random.default_rng(0).normal(size=(2, 7, D))
    act = ACTIVATIONS[activation]
    logits = x @ p["router"]["kernel"]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-probabilities, -1)[..., :2]
    weights = np.zeros_like(probabilities)
    np.put_along_axis(weights, best, np.take_along_axis(probabilities, best, -1), -1)
    weights /= weights.sum(-1, keepdims=True)
    kernels = {name: p[name].reshape(E, F, D) for name in ("gate", "up", "down") if name in p}
    up = np.einsum("btd,efd->btef", x, kernels["up"])
    up = up + p["up_bias"].reshape(E, F) if bias else up
    h = act(up)
    if "gate" in kernels:
        h = act(np.einsum("btd,efd->btef", x, kernels["gate"])) * up
    each = np.einsum("btef,efd->bted", h, kernels["down"])
    each = each + p["down_bias"] if bias else each
    expected = np.einsum("bted,bte->btd", each, weights)
    if shared:
        s = {n: q["kernel"] for n, q in p["shared"].items()}
        b = {n: q.get("bias", 0.0) for n, q in p["shared"].items()}
        gate, up = (x @ s[n] + b[n] for n in ("gate", "up"))
        always = (act(gate) * up) @ s["down"] + b["down"]
        expected = expected + always / (1 + np.exp(-x @ p["shared_gate"]["kernel"]))
    y, aux = layer(jnp.asarray(x, jnp.float32))
    close(y, expected, 1e-5)
    share = np.bincount(best.reshape(-1), minlength=E) / best.size
    close(aux["moe_load"], share, 1e-6)
    close(aux["moe_probability"], probabilities.mean((0, 1)), 1e-5)
    close(aux["moe_z"], (np.log(np.exp(logits).sum(-1)) ** 2).mean(), 1e-5)
    close(aux["moe_entropy"], -(probabilities * np.log(probabilities)).sum(-1).mean(), 1e-5)
    assert aux["moe_dropped"] == 0


def test_experts_compute_in_bfloat16_and_routers_in_float32():
    config = MoEConfig(E, F)
    layer, _ = drawn(config, MLPConfig(), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert layer.up.dtype == jnp.bfloat16 and layer.router.kernel.dtype == jnp.float32
    x = jax.random.normal(jax.random.key(0), (2, 9, D), jnp.float32)
    y, aux = layer(x)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in aux.values()} == {jnp.dtype("float32")}
    exact, _ = drawn(config, MLPConfig())
    expected, _ = exact(x)
    error = np.float64(y) - np.float64(expected)
    assert np.sqrt((error**2).mean()) < 0.02 * np.sqrt((np.float64(expected) ** 2).mean())


def test_gradients_in_bfloat16_are_summed_in_float32():
    """Of biases too: thousands of tokens' terms."""
    config = MoEConfig(2, F, "relu")
    x = jax.random.normal(jax.random.key(0), (4, 1024, D), jnp.float32) + 1

    def loss(params, graph):
        return jnp.mean(nnx.merge(graph, params)(x)[0].astype(jnp.float32) + 1)

    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        layer, _ = drawn(config, MLPConfig(bias=True), dtype=dtype)
        graph, params = nnx.split(layer)
        found.append(nnx.to_pure_dict(jax.grad(loss)(params, graph)))
    found = [{name: g[name] for name in ("up", "down", "up_bias", "down_bias")} for g in found]
    rms(*found, 0.02)


def test_what_is_not_finite_stays_with_its_token():
    """To the bit: a token of nan goes to the first experts, as this one did before."""
    layer, _ = drawn(MoEConfig(E, F), MLPConfig())
    x = jax.random.normal(jax.random.key(0), (2, 61, D), jnp.float32)
    first = np.all(layer.router(x).routing.experts == np.arange(2), axis=-1)
    row, token = np.argwhere(first)[0]
    y, _ = layer(x)
    spoiled, _ = layer(x.at[row, token].set(jnp.nan))
    others = np.ones(first.shape, bool)
    others[row, token] = False
    assert np.isnan(spoiled[row, token]).all()
    np.testing.assert_array_equal(spoiled[others], y[others])


def test_experts_start_as_the_mlps_do():
    wide = MoE(64, MoEConfig(4, 128), MLPConfig(init_std=0.05), rngs=nnx.Rngs(0))
    uniform = MoE(64, MoEConfig(4, 128), MLPConfig(init_std=None), rngs=nnx.Rngs(0))
    for name, fan_in in (("up", 64), ("gate", 64), ("down", 128)):
        assert abs(np.std(getattr(wide, name)[...]) - 0.05) < 0.001
        kernel = np.asarray(getattr(uniform, name)[...])
        assert abs(np.abs(kernel).max() * fan_in**0.5 - 1) < 0.01
    assert not np.array_equal(wide.up[...], wide.gate[...])


def test_expert_choice_gives_every_expert_as_many():
    config = MoEConfig(E, F, router=RouterConfig(kind="expert-choice", top=2))
    layer, _ = drawn(config, MLPConfig())
    x = jax.random.normal(jax.random.key(0), (2, 10, D), jnp.float32)
    y, aux = layer(x)
    assert np.isfinite(y).all()
    close(aux["moe_load"], np.full(E, 1 / E), 1e-6)
