"""Fixed-query attention's own laws: the softmax state, ties, extreme scores, the stored case."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import fixed_query
from scanax.kernels.monoid import LOWEST
from support.compare import close

B, T, H, G, K, V = 2, 37, 4, 2, 16, 3  # K**-0.5 is exact in binary
CASE = Path(__file__).parents[1] / "parity" / "op_aaren"


def draw(rng, dtype=np.float32):
    q, k, v = rng.normal(size=(H, K)), rng.normal(size=(B, T, G, K)), rng.normal(size=(B, T, G, V))
    state = rng.normal(size=(B, H)), rng.uniform(1, 2, (B, H)), rng.normal(size=(B, H, V))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, k, v, state))


def with_gradients(implementation, chunk=8):
    def call(inputs, cotangents, reset):
        def run(q, k, v, state):
            how = {"reset": reset, "chunk": chunk, "implementation": implementation}
            return fixed_query(q, k, v, state=state, **how)

        out, pull = jax.vjp(run, *inputs)
        return out, pull(cotangents)

    return jax.jit(call)


gradients_of = cache(with_gradients)


@pytest.mark.parametrize("implementation", ["xla", "reference", "associative"])
def test_stored_case(implementation):
    inputs, expected, grads = (
        np.load(CASE / f"{name}.npz") for name in ("inputs", "expected", "grads")
    )
    q, k, v, ct = (jnp.asarray(inputs[name]) for name in ("q", "k", "v", "ct"))

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(
            lambda *x: fixed_query(*x, chunk=16, implementation=implementation), q, k, v
        )
        return out, pull((ct, jax.tree.map(jnp.zeros_like, out[1])))

    (y, state), gradients = run(q, k, v)
    close(y, expected["o"], 2e-6)
    close(y, expected["o_fp64"], 2e-6)
    close(state, tuple(expected[name] for name in "muw"), 2e-6)
    close(gradients, tuple(grads[name] for name in ("dq", "dk", "dv")), 1e-5)


@pytest.mark.parametrize("top", [-20.0, 0.0, 20.0], ids=["token", "either", "state"])
def test_gradient_of_a_state_that_is_read_as_it_is(top):
    """Cotangents of (m, u, w) that no equivalent state would give: the maximum's own share."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, (m, u, w) = draw(rng, np.float64)
        inputs = q, k, v, (m + top, u, w)
        reset = jnp.zeros((B, T), bool).at[1, 5].set(True)
        ct = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape)), (jnp.zeros((B, T, H, V)), (m, u, w))
        )
        true = gradients_of("reference")(inputs, ct, reset)
        close(gradients_of("xla")(inputs, ct, reset), true, 1e-10)


def test_equal_scores_share_the_maximum_as_the_recurrence_has_it():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        q, k, v, (m, u, w) = draw(rng, np.float64)
        k = k.at[:, ::3].set(0)
        q = jnp.abs(q)
        k = -jnp.abs(k)  # the zeros are the maximum
        reset = jnp.zeros((B, T), bool).at[1, 20].set(True)
        ct = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape)), (jnp.zeros((B, T, H, V)), (m, u, w))
        )
        inputs = q, k, v, (0 * m, u, w)
        true = gradients_of("reference")(inputs, ct, reset)
        close(gradients_of("xla")(inputs, ct, reset), true, 1e-10)


def test_equivalent_states_read_the_same_and_get_the_same_gradients():
    rng = np.random.default_rng(2)
    q, k, v, (m, u, w) = draw(rng)
    shifted = m - 3, u * np.float32(np.e**3), w * np.float32(np.e**3)
    ct = jnp.asarray(rng.normal(size=(B, T, H, V)), jnp.float32), (0 * m, 0 * u, 0 * w)
    reset = jnp.zeros((B, T), bool)
    (y, _), (*plain, (dm, du, dw)) = gradients_of("xla")((q, k, v, (m, u, w)), ct, reset)
    (z, _), (*other, (em, eu, ew)) = gradients_of("xla")((q, k, v, shifted), ct, reset)
    close(z, y, 1e-5)
    close(other, plain, 1e-4)
    close((em, eu * np.e**3, ew * np.e**3), (dm, du, dw), 1e-4)


def test_no_state_is_the_identity():
    rng = np.random.default_rng(3)
    q, k, v, (m, u, w) = draw(rng)
    run = jax.jit(lambda state: fixed_query(q, k, v, state=state))
    close(run(None), run((jnp.full_like(m, LOWEST), 0 * u, 0 * w)), 0.0)


def test_scores_of_ten_thousands():
    """Integers, so that the scores themselves are exact in float32: the bars stay."""
    rng = np.random.default_rng(4)
    _, _, v, state = draw(rng)
    q = np.asarray(rng.integers(-160, 161, (H, K)), np.float32)
    k = np.asarray(rng.integers(-160, 161, (B, T, G, K)), np.float32)
    reset = jnp.asarray(rng.random((B, T)) < 0.1)
    ct = np.asarray(rng.normal(size=(B, T, H, V)), np.float32), jax.tree.map(jnp.zeros_like, state)
    inputs = q, k, v, state
    (y, final), gradients = gradients_of("xla")(inputs, ct, reset)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, ct))
        true, _ = jax.tree.map(np.asarray, gradients_of("reference")(*exact, reset))
    assert np.abs(true[1][0]).max() > 1e4
    close((y, final), true, 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_non_finite_numbers_stay_in_their_document():
    rng = np.random.default_rng(5)
    q, k, v, state = draw(rng)
    reset = jnp.zeros((B, T), bool).at[0, [10, 20]].set(True)
    ct = jnp.asarray(rng.normal(size=(B, T, H, V)), jnp.float32), jax.tree.map(jnp.ones_like, state)
    clean = gradients_of("xla")((q, k, v, state), ct, reset)
    k, v = k.at[0, 12].set(jnp.nan), v.at[0, 15, 0, 1].set(jnp.inf)
    (y, final), (_, dk, dv, dstate) = gradients_of("xla")((q, k, v, state), ct, reset)
    (true_y, true_final), (_, true_dk, true_dv, true_dstate) = clean
    inside = np.zeros((B, T), bool)
    inside[0, 10:20] = True
    close((dk[~inside], dv[~inside]), (true_dk[~inside], true_dv[~inside]), 1e-6)
    assert not np.isfinite(dk[inside]).any() and not np.isfinite(y[0, 12:20]).any()
    inside[0, 10:12] = False
    close((y[~inside], final, dstate), (true_y[~inside], true_final, true_dstate), 1e-6)


def test_backward_keeps_its_inputs_and_a_state_a_chunk():
    def kept(time, chunk=16):
        sizes = (H, K), (1, time, H, K), (1, time, H, V)
        inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
        pull = jax.eval_shape(
            lambda *x: jax.vjp(lambda *y: fixed_query(*y, chunk=chunk), *x)[1], *inputs
        )
        return sum(x.size for x in jax.tree.leaves(pull))

    tokens, states = 1024 * H * (K + V), 1024 // 16 * H * (2 + V)
    assert kept(2048) - kept(1024) == tokens + states


q, k, v = (jnp.zeros(s, jnp.float32) for s in ((4, 8), (2, 6, 2, 8), (2, 6, 2, 3)))
m = jnp.zeros((2, 4), jnp.float32)
WRONG = {
    "differ in batch": (q, k, v[:, :5], {}),
    "holds no token": (q, k[:, :0], v[:, :0], {}),
    "8 features and k 7": (q, k[..., :7], v, {}),
    "2 heads, which does not divide 3": (q[:3], k, v, {}),
    "state has shapes": (q, k, v, {"state": (m, m, m)}),
    "reset has shape": (q, k, v, {"reset": jnp.zeros((2, 5), bool)}),
    "chunk=0": (q, k, v, {"chunk": 0}),
    "v is int32": (q, k, v.astype(np.int32), {}),
    "it must have 2 axes": (q[0], k, v, {}),
    "has no features": (q[:, :0], k[..., :0], v, {}),
}


@pytest.mark.parametrize("words", WRONG)
def test_errors_name_the_value(words, unchecked):
    q, k, v, how = WRONG[words]
    with pytest.raises(ValueError, match=words):
        fixed_query(q, k, v, **how)
