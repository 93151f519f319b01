"""ConvS5: the published code's numbers, any cut of a stream, its start, what bars do not see."""

import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.convs5 import ConvS5, ConvS5Config
from scanax.layers.diagonal import held, legs
from scanax.layers.image import ImageConv
from scanax.layers.norm import GroupNorm
from scanax.sharding import mesh
from support.compare import close, rms

CASE = Path(__file__).parents[1] / "parity" / "convs5_standard"
SMALL = {"image": (4, 5), "groups": 2, "state": 12, "blocks": 2}
WIDTH, BATCH, TIME = 8, 2, 6


def ours(stored, i):
    """A layer's arrays, or their gradients, by our names and in our layout."""
    x = {
        k.removeprefix(f"layers_{i}."): v for k, v in stored.items() if k.startswith(f"layers_{i}")
    }
    B, D = x["seq.B"], "seq.C_D_conv."
    B = B.reshape(B.shape[0], -1, 3, 3, 2).transpose(2, 3, 1, 0, 4)
    return {
        "Lambda_re": x["seq.Lambda_re"],
        "Lambda_im": x["seq.Lambda_im"],
        "log_step": x["seq.log_step"][:, 0],
        "B": {"kernel": B},
        "C": {"kernel": x["seq.C"]},
        "D": {"kernel": x[D + "Conv_0.kernel"], "bias": x[D + "Conv_0.bias"]},
        "group_norm": {"scale": x[D + "GroupNorm_0.scale"], "bias": x[D + "GroupNorm_0.bias"]},
        "norm": {"scale": x["norm.scale"], "bias": x["norm.bias"]},
    }


def test_the_reference_case():
    stored = {
        n: dict(np.load(CASE / f"{n}.npz")) for n in ("params", "inputs", "expected", "grads")
    }
    config = ConvS5Config(image=(5, 6), state=16, blocks=2, groups=4)
    graph = nnx.graphdef(ConvS5(8, config, rngs=nnx.Rngs(0)))

    def by_row(x):
        return jnp.asarray(np.swapaxes(x, 0, 1), jnp.float32)

    def parts(x):
        return {"re": jnp.asarray(x.real.copy()), "im": jnp.asarray(x.imag.copy())}

    states = [parts(stored["inputs"][f"x0_{i}"]) for i in range(2)]
    after = [parts(stored["expected"][f"xL_{i}"]) for i in range(2)]

    def loss(params, u):
        total, last = jnp.zeros((), jnp.float32), []
        for i in range(2):
            u, state = nnx.merge(graph, params[i])(u, states[i])
            total += 0.1 * ((state["re"] ** 2).sum() + 0.5 * (state["im"] ** 2).sum())
            last.append(state)
        return total + jnp.sum(u * by_row(stored["inputs"]["ct"])), (u, last)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    params = [ours(stored["params"], i) for i in range(2)]
    (_, (y, last)), (d_params, du) = run(params, by_row(stored["inputs"]["u"]))
    close(y, by_row(stored["expected"]["y"]), 3e-6)
    close(last, after, 3e-6)
    close(du, by_row(stored["grads"]["u"]), 1e-5)
    close(d_params, [ours(stored["grads"], i) for i in range(2)], 1e-5)


@cache
def case(block, dtype=jnp.float32, over=""):
    """(call(x, state, reset), model, input, resets inside and at the start of rows)."""
    model = ConvS5(WIDTH, ConvS5Config(block=block, **SMALL), dtype=dtype, rngs=nnx.Rngs(1))
    graph, params = nnx.split(model)
    call = jax.jit(lambda p, x, state, reset: nnx.merge(graph, p)(x, state, reset))
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(BATCH, TIME, 4, 5, WIDTH)), dtype)
    reset = np.zeros((BATCH, TIME), bool)
    reset[0, 3] = reset[1, [0, TIME - 1]] = True
    return lambda *args: call(params, *args), model, x, jnp.asarray(reset)


def in_pieces(block, sizes):
    run, model, x, reset = case(block)
    state, outputs, at = model.init_state(BATCH, TIME, x.dtype), [], 0
    for size in sizes:
        y, state = run(x[:, at : at + size], state, reset[:, at : at + size])
        outputs.append(y)
        at += size
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("block", ["standard", "resnet"])
def test_any_cut_of_a_stream_gives_the_same(block):
    run, _, x, reset = case(block)
    whole = run(x, None, reset)
    close(in_pieces(block, [1] * TIME), whole, 1e-6)
    close(in_pieces(block, [3, 3]), whole, 1e-6)


@pytest.mark.parametrize("block", ["standard", "resnet"])
def test_documents_do_not_see_each_other(block):
    run, _, x, reset = case(block)
    y, state = run(x, None, reset)
    alone, _ = run(x[:, :3], None, jnp.zeros((BATCH, 3), bool))
    close(y[0, :3], alone[0], 1e-6)
    alone, after = run(x[:, 3:], None, jnp.zeros((BATCH, 3), bool))
    close((y[0, 3:], state["re"][0]), (alone[0], after["re"][0]), 1e-6)
    other = run(x.at[0, 1].set(jnp.nan), None, reset)[0]
    np.testing.assert_array_equal(other[0, 3:], y[0, 3:])
    assert np.isnan(other[0, 2]).all()


def test_bfloat16_keeps_its_state_and_sums_in_float32():
    run, model, x, reset = case("standard", jnp.bfloat16)
    y, state = run(x, None, reset)
    assert y.dtype == jnp.bfloat16
    assert all(part.dtype == jnp.float32 for part in (*state.values(), model.norm.scale[...]))
    exact, state_exact = case("standard")[0](x.astype(jnp.float32), None, reset)
    rms(y, exact, 0.01)
    rms(state, state_exact, 0.01)


@pytest.mark.parametrize("over", ["data=2,seq=2,tensor=2", "seq=3"])
def test_a_mesh_changes_nothing_and_gathers_no_image(over):
    """Twelve numbers of state are six channels: they divide over two devices of tensor."""
    _, model, x, reset = case("standard")
    graph, params = nnx.split(model)

    def loss(params, x, reset):
        y, state = nnx.merge(graph, params)(x, None, reset)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state["re"] ** 2), (y, state)

    def run():
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    alone = run()(params, x, reset)
    grid = mesh.make(over)
    with jax.set_mesh(grid):
        where = mesh.sharding(grid, mesh.ROWS, "seq")
        compiled = run().lower(params, jax.device_put(x, where), reset).compile()
        close(compiled(params, jax.device_put(x, where), reset), alone, 2e-5)
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathers  # of summaries, which have no time, and of channels that lie over tensor
    time = TIME // mesh.parse(over)["seq"]
    whole = re.compile(rf"\[({BATCH},{time}|\d+,{TIME}|{BATCH * TIME}),4,5,")
    assert not [line for line in gathers if whole.search(line)]


def test_the_hippo_matrix_is_a_half_and_frequencies():
    n = np.arange(64)
    root = np.sqrt(2 * n + 1)
    A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0) + np.outer(root, root) / 2
    w, V = legs(64)
    assert w.shape == (32,) and V.shape == (64, 32) and (w < 0).all()
    close(np.abs(A @ V - V * (-0.5 + 1j * w)), np.zeros((64, 32)), 1e-9)
    close(np.abs(V.conj().T @ V), np.eye(32), 1e-12)
    assert abs(w[0] + 1303) < 1  # the published largest
    model = ConvS5(WIDTH, ConvS5Config(**SMALL), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.Lambda_re[...], -0.5)
    close(model.Lambda_im[...], np.tile(legs(6)[0], 2), 1e-6)
    steps = np.exp(ConvS5(WIDTH, ConvS5Config(groups=2, state=512), rngs=nnx.Rngs(0)).log_step[...])
    assert 1e-3 <= steps.min() < 1.1e-3 and 0.09 < steps.max() <= 0.1 * 1.0001


def test_kernels_begin_he_normal_in_the_basis_of_the_eigenvectors():
    """|B|^2 of half the eigenvectors holds half of a real matrix's, and C the same."""
    config = ConvS5Config(groups=2, state=64, kernel_in=5, kernel_out=3, blocks=2)
    model = ConvS5(32, config, rngs=nnx.Rngs(0))
    B, C = model.B.kernel[...], model.C.kernel[...]
    assert B.shape == (5, 5, 32, 32, 2) and C.shape == (3, 3, 32, 32, 2)
    assert abs(float((B**2).sum(-1).mean()) / (2 / (32 * 25)) - 1) < 0.03
    assert abs(float((C**2).sum(-1).mean()) / (2 / (64 * 9)) - 1) < 0.03
    V = np.kron(np.eye(2), legs(32)[1])  # two blocks: 64 numbers of state, 32 eigenvectors
    whole = 2 * np.real(np.einsum("hwdp,np->hwdn", B[..., 0] + 1j * B[..., 1], V))
    assert abs(whole.var() / (2 / (32 * 25)) - 1) < 0.05  # V V^H + its conjugate is the identity


def test_the_step_into_the_state_is_accurate_where_eigenvalues_are_clipped():
    """exp(x) - 1 in float32 would be wrong in the first digit for 1e-4 x 1e-3."""
    real = np.array([-1e-4, -1e-4, -0.5, -30.0, -1e-4], np.float32)
    imaginary = np.array([0.0, 1e-3, 0.7, -2.0, -900.0], np.float32)
    dt = np.array([1e-3, 1e-3, 1e-3, 0.1, 1e-3], np.float32)
    parts = [np.asarray(x, np.float64) for x in held(*map(jnp.asarray, (real, imaginary, dt)))]
    got = parts[0] + 1j * parts[1]
    L, dt = np.float64(real) + 1j * np.float64(imaginary), np.float64(dt)
    series = dt * (1 + L * dt / 2 * (1 + L * dt / 3 * (1 + L * dt / 4)))
    exact = np.where(np.abs(L * dt) < 1e-3, series, (np.exp(L * dt) - 1) / L)
    assert (np.abs(got - exact) <= 1e-6 * np.abs(exact)).all()


def small_model(**changes):
    model = ConvS5(WIDTH, ConvS5Config(**SMALL | changes), rngs=nnx.Rngs(1))
    return model, jnp.asarray(
        np.random.default_rng(3).normal(size=(1, 3, 4, 5, WIDTH)), jnp.float32
    )


def test_a_layer_is_its_equations_in_complex_numbers():
    """The factor 2, the clip, B' and the epsilons, in float64 by shifted sums."""
    eps, clip = 0.3, -1e-4
    model, x = small_model(norm_eps=eps)
    model.Lambda_re[...] = model.Lambda_re[...].at[1].set(2.0)  # clipped
    model.D.bias[...] += 0.5
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(model)))

    def conv(x, kernel):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = ((a, b, padded[:, :, a : a + 4, b : b + 5]) for a in range(3) for b in range(3))
        return sum(np.einsum("bthwi,io->bthwo", part, kernel[a, b]) for a, b, part in shifted)

    L = np.minimum(p["Lambda_re"], clip) + 1j * p["Lambda_im"]
    step = np.exp(p["log_step"])
    B, C = (p[n]["kernel"] @ np.array([1, 1j]) for n in "BC")
    u, X, y = np.asarray(x, np.float64), 0, []
    drive = conv(u, (np.exp(L * step) - 1) / L * B)
    for t in range(3):
        X = np.exp(L * step) * X + drive[:, t]
        y.append(2 * np.real(conv(X[:, None], C)))
    y = np.concatenate(y, axis=1) + conv(u, p["D"]["kernel"]) + p["D"]["bias"]
    groups = y.reshape(1, 3, 4, 5, 2, WIDTH // 2)
    mean, var = (f(axis=(2, 3, 5), keepdims=True) for f in (groups.mean, groups.var))
    y = ((groups - mean) / np.sqrt(var + eps)).reshape(y.shape)
    y = u + y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)
    got, state = model(x)
    close(got, y, 1e-5)
    close((state["re"], state["im"]), (X.real, X.imag), 1e-5)


def test_without_the_clip_an_eigenvalue_is_taken_as_it_is():
    decays = []
    for clip in (True, False):
        model, _ = small_model(clip=clip)
        model.Lambda_re[...] *= 0.0
        log, _ = model.discretised()
        decays.append(log[0])
    close(decays[0], -1e-4 * np.exp(model.log_step[...]), 1e-6)
    np.testing.assert_array_equal(decays[1], 0)


def test_the_resnet_block_is_its_equation():
    model, x = small_model(block="resnet")
    y = jnp.asarray(np.random.default_rng(4).normal(size=x.shape), jnp.float32)
    gelu = jax.nn.gelu
    inner = model.conv_2(gelu(model.norm_2(model.conv_1(gelu(model.norm_1(y))))))
    close(model.after(y, x), gelu(inner + y), 1e-6)


def test_group_norm_and_its_epsilon():
    x = 3 + np.random.default_rng(5).normal(size=(2, 3, 4, 5, 6))
    norm = GroupNorm(6, 3, 0.1, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = norm.scale[...] * 2, norm.bias[...] + 1
    groups = x.reshape(2, 3, 4, 5, 3, 2)
    mean, var = (f(axis=(2, 3, 5), keepdims=True) for f in (groups.mean, groups.var))
    expected = 2 * (groups - mean) / np.sqrt(var + 0.1) + 1
    close(norm(jnp.asarray(x, jnp.float32)), expected.reshape(x.shape), 1e-6)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="state=6 is not an even number for each of blocks=2"):
        ConvS5(8, ConvS5Config(state=6, blocks=2, groups=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="groups=32 do not divide the width 8"):
        ConvS5(8, ConvS5Config(), rngs=nnx.Rngs(0))
    assert ImageConv(2, 4, 5, rngs=nnx.Rngs(0)).kernel.shape == (5, 5, 2, 4)
