"""The projection of every layer: its gradients, and how a CPU computes them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import linear
from support.compare import close


@pytest.fixture(params=[False, True], ids=["two axes", "one axis"])
def either(request, monkeypatch):
    """Both ways, whichever this jax takes."""
    monkeypatch.setattr(linear, "RECOMPUTES", request.param)


@pytest.mark.parametrize("rows", [(2, 5), (7,), (1, 3), (2, 3, 4), (0, 5), ()])
def test_gradients_are_those_of_the_product(rows, either):
    """Of any axes of rows, none and empty ones too; and of the gradients themselves."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, ct = (
        jax.random.normal(k, (*rows, n), jnp.float32) for k, n in zip(keys, (6, 4), strict=False)
    )
    w = jax.random.normal(keys[2], (6, 4), jnp.float32)

    def ours(x, w):
        return linear.product(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision="highest")

    def slope(product, x, w):
        return jax.grad(lambda x, w: (product(x, w) * ct).sum() ** 2, argnums=(0, 1))(x, w)

    def curve(product, x, w):
        return jax.grad(lambda x, w: sum((g**2).sum() for g in slope(product, x, w)), (0, 1))(x, w)

    for of in slope, curve:
        found, exact = of(ours, x, w), of(jnp.matmul, np.float32(x), w)
        for a, b in zip(found, exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(initial=0))


def test_bfloat16_stays_bfloat16(either):
    """Products and gradients of a bfloat16 layer; the parameter's own is float32."""
    layer = linear.Linear(64, 32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (2, 16, 64), jnp.bfloat16)
    y, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
    d_params, dx = pull(y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    d_kernel = d_params["kernel"][...]
    assert d_kernel.dtype == jnp.float32
    exact = np.einsum("bti,bto->io", *(np.float64(a) for a in (x, y)))
    close(d_kernel, exact, 2**-7)


def test_a_cpu_turns_x_before_it_sums_over_rows():
    """A sum over the rows of x as it lies is read column by column; jax 0.10 does no better."""
    x, w = jnp.ones((4, 64, 32), jnp.float32), jnp.ones((32, 16), jnp.float32)

    def loss(w, x):
        return (linear.product(x, w, (((2,), (0,)), ((), ()))) ** 2).sum()

    text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    axes = re.findall(r"f32\[32,16\]\S* dot\(.*lhs_contracting_dims=\{(\d)\}", text)
    assert axes == ["0" if linear.RECOMPUTES else "1"]


def test_features_that_do_not_fit_are_named(unchecked):
    with pytest.raises(ValueError, match="x has 5 features; the projection takes 6"):
        linear.product(jnp.ones((2, 5)), jnp.ones((6, 4)), (((1,), (0,)), ((), ())))
