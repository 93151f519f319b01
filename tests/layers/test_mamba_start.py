"""Mamba's and Mamba-2's initial values are those that were published, their options work, and what
a step size costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.kernels import keep
from scanax.layers.depth import Depth
from scanax.layers.mamba import Mamba, MambaConfig, softplus
from scanax.layers.mamba2 import Mamba2, Mamba2Config
from support.compare import close

WIDTH, BRANCHES = 256, 16


@pytest.fixture(scope="module")
def mamba():
    return Mamba(WIDTH, MambaConfig(), depth=Depth(branches=BRANCHES), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def mamba2():
    config = Mamba2Config(head_width=1, groups=2, state=16)  # many heads, for the statistics
    return Mamba2(WIDTH, config, depth=Depth(branches=BRANCHES), rngs=nnx.Rngs(0))


def is_uniform(values, low, high):
    """Inside the range, reaching to its ends, with the mean and spread of a uniform draw."""
    values, width = np.asarray(values, np.float64), high - low
    assert low <= values.min() < low + 0.05 * width and high - 0.05 * width < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 0.06 * width
    assert abs(values.std() - width / 12**0.5) < 0.04 * width


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_steps_are_log_uniform(name, request):
    bias = np.asarray(request.getfixturevalue(name).dt_bias[...], np.float64)
    is_uniform(np.log(np.log1p(np.exp(bias))), np.log(1e-3 * 0.999), np.log(0.1 * 1.001))


def test_steps_have_a_floor():
    config = MambaConfig(dt_min=1e-6, dt_max=1e-5, dt_floor=1e-4)
    bias = np.asarray(Mamba(64, config, rngs=nnx.Rngs(0)).dt_bias[...], np.float64)
    np.testing.assert_allclose(np.log1p(np.exp(bias)), 1e-4, rtol=1e-4)


def test_mamba_decays_at_the_rates_1_to_n_and_passes_its_input(mamba):
    rates = np.broadcast_to(np.arange(1, 17), (2 * WIDTH, 16))
    np.testing.assert_allclose(np.exp(mamba.A_log[...]), rates, rtol=1e-6)
    np.testing.assert_array_equal(mamba.D[...], 1)
    assert mamba.dt_up.kernel.shape == (16, 2 * WIDTH)  # rank 256 / 16


def test_mamba2_decays_at_rates_uniform_in_1_to_16(mamba2):
    is_uniform(np.exp(mamba2.A_log[...]), 1 - 1e-5, 16 + 1e-5)
    np.testing.assert_array_equal(mamba2.D[...], 1)
    np.testing.assert_array_equal(mamba2.scale[...], 1)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_kernels_are_uniform_within_a_root_of_fan_in(name, request):
    """That of the output divided by the root of the number of residual branches."""
    model = request.getfixturevalue(name)
    roles = {"x", "z", "B", "C"} | ({"dt_down", "dt_up"} if name == "mamba" else {"dt"})
    for role in roles:
        kernel = getattr(model, role).kernel[...]
        is_uniform(kernel, -(kernel.shape[0] ** -0.5), kernel.shape[0] ** -0.5)
    is_uniform(model.out.kernel[...], -((32 * WIDTH) ** -0.5), (32 * WIDTH) ** -0.5)


@pytest.mark.parametrize("norm", ["none", "plain", "weighted"])
def test_norms_take_the_scale_out_of_dt_B_and_C(norm):
    model = Mamba(16, MambaConfig(state=4, norm=norm, norm_eps=1e-12), rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, x: model(x)[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 16)), jnp.float32)
    before = run(model, x)
    for role in ("dt_down", "B", "C"):
        getattr(model, role).kernel[...] *= 4.0
        same = float(jnp.abs(run(model, x) - before).max() / jnp.abs(before).max()) < 1e-5
        assert same == (norm != "none"), role
    if norm == "weighted":
        for role in ("dt_norm", "B_norm", "C_norm"):
            getattr(model, role).scale[...] *= 4.0
            after = run(model, x)
            assert jnp.abs(after - before).max() > 0.1 * jnp.abs(before).max(), role
            before = after


def test_without_selection_it_is_a_convolution_with_a_fixed_kernel():
    """out = W(silu(z) (u * k)), k_j = sum_n C_n exp(j dt A_n) dt B_n, and D at j = 0 besides."""
    config = MambaConfig(state=4, dt_min=0.1, dt_max=1.0, selective=False)
    model = Mamba(8, config, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 11, 8))
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(model)))

    def silu(x):
        return x / (1 + np.exp(-x))

    def convolved(u, kernel):  # (B, T, D), (J, D)
        spans = (kernel[j] * u[:, : u.shape[1] - j] for j in range(min(len(kernel), u.shape[1])))
        return sum(np.pad(s, ((0, 0), (u.shape[1] - s.shape[1], 0), (0, 0))) for s in spans)

    u = convolved(x @ p["x"]["kernel"], p["conv"]["kernel"][::-1]) + p["conv"]["bias"]
    dt, A = np.log1p(np.exp(p["dt_bias"])), -np.exp(p["A_log"])
    powers = np.exp(np.arange(11)[:, None, None] * dt[:, None] * A)  # (J, D, N)
    kernel = np.einsum("n,jdn,d,n->jd", p["C_constant"], powers, dt, p["B_constant"])
    kernel[0] += p["D"]
    y = convolved(silu(u), kernel) * silu(x @ p["z"]["kernel"])
    close(model(jnp.asarray(x, jnp.float32))[0], y @ p["out"]["kernel"], 1e-5)


@pytest.mark.parametrize("option", [{"norm": "plain"}, {"dt_rank": 2}])
def test_without_selection_nothing_makes_dt_B_and_C(option, unchecked):
    with pytest.raises(ValueError, match=r"with selective=False, where no projection makes"):
        Mamba(8, MambaConfig(selective=False, **option), rngs=nnx.Rngs(0))


def test_mamba2_clamps_its_steps():
    """With the range one point, every step is that, whatever the input."""
    config = Mamba2Config(head_width=8, state=4, dt_limit=(0.5, 0.5))
    model = Mamba2(16, config, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 16), jnp.float32)
    y, state = model(x)
    model.dt_bias[...] += 3.0
    again, after = model(x)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(state["S"], after["S"])
    assert jnp.abs(state["S"]).max() > 0


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="inner width 32 = 2 x 16 must split into heads of"):
        Mamba2(16, Mamba2Config(head_width=7), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="groups=3"):
        Mamba2(16, Mamba2Config(head_width=8, groups=3), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind, config", [(Mamba, MambaConfig), (Mamba2, Mamba2Config)])
def test_the_inner_width_may_be_any_whole_number(kind, config):
    sizes = {"head_width": 2} if kind is Mamba2 else {}
    model = kind(12, config(expand=7 / 6, state=4, **sizes), rngs=nnx.Rngs(0))
    assert model.x.kernel.shape == (12, 14) and model.out.kernel.shape == (14, 12)
    for expand in (1.3, 0.0, -1.0):
        with pytest.raises(ValueError, match=rf"expand={expand} x width=12 is not a whole number"):
            kind(12, config(expand=expand), rngs=nnx.Rngs(0))


def test_the_gradient_of_a_step_size_needs_no_logarithm():
    """Where its argument is kept and the rest computed again."""
    x = jnp.linspace(-40, 40, 401, dtype=jnp.float32)
    np.testing.assert_array_equal(softplus(x), jax.nn.softplus(x))

    def compiled(of):
        return jax.jit(jax.grad(lambda x: keep.again(of)(x).sum())).lower(x).compile()

    np.testing.assert_allclose(compiled(softplus)(x), jax.nn.sigmoid(x), rtol=1e-6)
    logarithm = re.compile(r"= f32\S* log(-plus-one)?\(")
    assert logarithm.search(compiled(jax.nn.softplus).as_text())
    assert not logarithm.search(compiled(softplus).as_text())
