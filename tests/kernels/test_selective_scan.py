"""The selective scan against other code's numbers and a plain numpy recurrence; what it keeps."""

import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import selective_scan
from scanax.kernels.selective_scan import xla
from support.compare import close, rms

CASE = Path(__file__).parents[1] / "parity" / "op_selective_scan"
LOGS = np.array([0.0, -1e-4, -1.0, -30.0, -200.0])
TIME = 67


def test_the_reference_case():
    """The layout (B, D, T), softplus and the gate z are the case's, not the operation's."""
    inputs, expected, grads = (
        {k: jnp.asarray(v) for k, v in np.load(CASE / f"{name}.npz").items()}
        for name in ("inputs", "expected", "grads")
    )
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")

    def run(u, dt, A, B, C, D, z, dt_bias):
        delta = jax.nn.softplus(dt + dt_bias[:, None])
        u, delta, B, C = (jnp.swapaxes(x, 1, 2) for x in (u, delta, B, C))
        y, state = selective_scan(u, delta, A, B, C, D=D)
        return jnp.swapaxes(y, 1, 2) * jax.nn.silu(z), state

    out, pull = jax.vjp(jax.jit(run), *(inputs[n] for n in names))
    close(out, (expected["y"], expected["last_state"]), 2e-6)
    close(pull((inputs["ct"], inputs["cs"])), tuple(grads[f"d{n}"] for n in names), 1e-5)


def by_hand(u, delta, A, B, C, D, state, reset, dy, dstate):
    """Values and gradients of one row, (T, D) and (T, N), token after token in numpy."""
    before, after, h = [], [], state
    for t in range(len(u)):
        before.append(np.zeros_like(h) if reset[t] else h)
        h = np.exp(delta[t][:, None] * A) * before[t] + np.outer(delta[t] * u[t], B[t])
        after.append(h)
    y = np.stack([h @ c for h, c in zip(after, C, strict=True)]) + D * u
    lam, dA = dstate, np.zeros_like(A)
    du, ddelta, dB, dC = D * dy, np.zeros_like(u), np.zeros_like(B), np.zeros_like(C)
    for t in reversed(range(len(u))):
        lam = lam + np.outer(dy[t], C[t])
        a = np.exp(delta[t][:, None] * A)
        log = lam * a * before[t]
        dA += log * delta[t][:, None]
        ddelta[t] = (log * A).sum(1) + u[t] * (lam @ B[t])
        du[t] += delta[t] * (lam @ B[t])
        dB[t], dC[t] = (delta[t] * u[t]) @ lam, dy[t] @ after[t]
        lam = np.zeros_like(lam) if reset[t] else a * lam
    return (y, after[-1]), (du, ddelta, dA, dB, dC, (dy * u).sum(0), lam)


@cache
def problem(time, batch=2, width=5, size=3):
    """Arguments, resets, cotangents and the answer; delta A is drawn from LOGS, mixed."""
    rng = np.random.default_rng(time)
    tokens = (batch, time)
    u, B, C = (rng.normal(size=(*tokens, n)) for n in (width, size, size))
    delta, A = -rng.choice(LOGS, (*tokens, width)), -rng.uniform(0.5, 1, (width, size))
    D, state = rng.normal(size=width), rng.normal(size=(batch, width, size))
    reset = rng.random(tokens) < 0.1
    dy, dstate = rng.normal(size=u.shape), rng.normal(size=state.shape)
    arguments, cotangents = (u, delta, A, B, C, D, state), (dy, dstate)
    rows = [
        by_hand(u[i], delta[i], A, B[i], C[i], D, state[i], reset[i], dy[i], dstate[i])
        for i in range(batch)
    ]
    values = [np.stack(x) for x in zip(*(row[0] for row in rows), strict=True)]
    du, ddelta, dA, dB, dC, dD, dh = (np.stack(x) for x in zip(*(r[1] for r in rows), strict=True))
    gradients = du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dh
    return arguments, reset, cotangents, (tuple(values), gradients)


@partial(jax.jit, static_argnames="chunk")
def run(arguments, reset, cotangents, chunk=None):
    def op(u, delta, A, B, C, D, state):
        return selective_scan(u, delta, A, B, C, D=D, state=state, reset=reset, chunk=chunk)

    out, pull = jax.vjp(op, *arguments)
    return out, pull(cotangents)


@pytest.mark.parametrize("time", [1, TIME])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, TIME])
def test_chunks_are_the_recurrence_in_float64(time, chunk):
    if chunk > time:
        chunk = time + 1  # longer than the row: the row
    arguments, reset, cotangents, answer = problem(time)
    with jax.enable_x64(True):
        close(run(arguments, reset, cotangents, chunk), answer, 1e-10)


def single(tree):
    return jax.tree.map(lambda x: x.astype(np.float32), tree)


def test_the_default_chunk_in_float32():
    arguments, reset, cotangents, (values, gradients) = problem(TIME)
    got = run(single(arguments), reset, single(cotangents))
    close(got[0], values, 1e-5)
    close(got[1], gradients, 1e-4)


@pytest.mark.parametrize("x64", [False, True])
def test_bfloat16_tokens_keep_a_float32_state(x64):
    """u, B, C in bfloat16, delta in float32 as the layer gives it; the gradients' dtypes follow."""
    names = ("u", "delta", "A", "B", "C", "D", "state")
    half = {"u", "B", "C"}
    arguments, reset, (dy, dstate), _ = problem(TIME)

    def rounded(x, name):
        return np.asarray(x, jnp.bfloat16 if name in half else np.float32)

    arguments = tuple(map(rounded, arguments, names))
    cotangents = rounded(dy, "u"), rounded(dstate, "state")
    with jax.enable_x64(x64):
        out, gradients = run(arguments, reset, cotangents)
    assert [x.dtype for x in out] == [jnp.bfloat16, jnp.float32]
    assert [g.dtype for g in gradients] == [x.dtype for x in arguments]
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(np.float64), (arguments, cotangents))
        rms((out, gradients), run(exact[0], reset, exact[1]), 0.003)


def test_no_reset_is_a_reset_nowhere():
    arguments, reset, cotangents, _ = problem(TIME)
    arguments, cotangents, never = single(arguments), single(cotangents), np.zeros_like(reset)
    close(run(arguments, None, cotangents, 7), run(arguments, never, cotangents, 7), 1e-6)


def test_memory_is_a_state_a_chunk():
    """What a gradient keeps is a fraction of a state for every token, padded or not."""
    width, size = 64, 16

    def temporaries(time, implementation):
        def loss(u, delta, A, B, C):
            y, _ = selective_scan(u, delta, A, B, C, chunk=16, implementation=implementation)
            return jnp.sum(y * y)

        shapes = (
            (1, time, width),
            (1, time, width),
            (width, size),
            (1, time, size),
            (1, time, size),
        )
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 4 * width * size
    assert temporaries(1024, "reference") > 1024 * state
    assert temporaries(1024, "xla") < 0.25 * 1024 * state
    assert temporaries(1021, "xla") < 0.6 * 1024 * state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": (2, 3, 5)}, r"delta has shape \(2, 3, 5\), not \(2, 3, 4\)"),
        ({"A": (3, 2)}, r"A has shape \(3, 2\), not \(4, 2\)"),
        ({"B": (2, 3, 1)}, r"B has shape \(2, 3, 1\), not \(2, 3, 2\)"),
        ({"state": (2, 2, 4)}, r"state has shape \(2, 2, 4\), not \(2, 4, 2\)"),
        ({"u": (2, 0, 4)}, "holds no token"),
        ({"chunk": 0}, "chunk=0; it must be at least 1"),
        ({"u": (2, 3)}, r"u has shape \(2, 3\); it must have 3 axes"),
    ],
)
def test_wrong_arguments_are_named(unchecked, change, message):
    shapes = {"u": (2, 3, 4), "delta": (2, 3, 4), "A": (4, 2), "B": (2, 3, 2), "C": (2, 3, 2)}
    shapes |= {"D": (4,), "state": (2, 4, 2)}
    chunk = change.get("chunk")
    shapes |= {k: v for k, v in change.items() if k != "chunk"}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{k: jnp.zeros(s, jnp.float32) for k, s in shapes.items()}, chunk=chunk)


def test_powers_of_two():
    """Of every size, the ends, and both derivatives."""
    x = np.random.default_rng(0).uniform(-126, 127.5, 100_000).astype(np.float32)
    x = np.concatenate([x, x / 100, x / 1e6])
    exact = 2.0 ** x.astype(np.float64)
    assert np.abs(np.asarray(jax.jit(xla.exp2)(x)) / exact - 1).max() < 2 * 2.0**-24
    ends = np.asarray([-np.inf, -1e30, -127, 128, 1e30, np.inf, np.nan, 0], np.float32)
    np.testing.assert_array_equal(xla.exp2(ends), [0, 0, 0, *[np.inf] * 3, np.nan, 1])
    x, ln2 = jnp.linspace(-20, 3, 99, dtype=jnp.float32), math.log(2)
    once, twice = jax.grad(xla.exp2), jax.grad(jax.grad(xla.exp2))
    np.testing.assert_allclose(jax.vmap(once)(x), ln2 * 2.0**x, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(twice)(x), ln2**2 * 2.0**x, rtol=3e-5)


def test_the_fastest_decay_there_is():
    """Of the largest rate float32 has; a step of zero keeps the state all the same."""
    A = jnp.full((1, 1), jnp.finfo(jnp.float32).min)
    one = jnp.ones((1, 2, 1), jnp.float32)
    state = jnp.full((1, 1, 1), 3.0, jnp.float32)
    y, _ = selective_scan(one, jnp.asarray([[[0.0], [1.0]]], jnp.float32), A, one, one, state=state)
    np.testing.assert_array_equal(y[0, :, 0], [3, 1])
