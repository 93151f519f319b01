"""The diagonal scan beside the laws of all mixers: what it keeps, spans, images, documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import diagonal_scan
from scanax.kernels.diagonal_scan import summary
from support.compare import close, rms

BATCH, TIME, IMAGE, P = 2, 12, (3, 2), 4
RESET = np.zeros((BATCH, TIME), bool)
RESET[0, [4, 8]] = RESET[1, [0, 6]] = True
HOW = ("xla", "reference", "associative")


def draw(kind, dtype=np.float32, time=TIME, turns=1.0):
    rng = np.random.default_rng(0)

    def pair(*shape):
        return tuple(rng.normal(size=shape).astype(dtype) for _ in range(2))

    shape = (P,) if kind == "constant" else (BATCH, time, P)
    log = -rng.uniform(0, 2, shape).astype(dtype), turns * rng.normal(size=shape).astype(dtype)
    return pair(BATCH, time, *IMAGE, P), log, pair(BATCH, *IMAGE, P)


def in_numpy(u, log, state, reset):
    """x and the last state, one token after another in complex128."""
    u, log, x = (np.float64(a) + 1j * np.float64(b) for a, b in (u, log, state))
    log, found = np.broadcast_to(log, (BATCH, u.shape[1], P)), []
    for t in range(u.shape[1]):
        x = np.where(reset[:, t, None, None, None], 0, x)
        x = np.exp(log[:, t])[:, None, None] * x + u[:, t]
        found.append(x)
    y = np.stack(found, axis=1)
    return (y.real, y.imag), (x.real, x.imag)


def gradients(how, reset=RESET):
    reset = None if reset is None else jnp.asarray(reset)

    def call(u, log, state, cotangents):
        def op(u, log, state):
            return diagonal_scan(u, log, state=state, reset=reset, implementation=how)

        out, pull = jax.vjp(op, u, log, state)
        return out, pull(cotangents)

    return jax.jit(call)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["constant", "by token"])
def test_images_of_numbers_decay_alike(kind, how):
    u, log, state = draw(kind)
    got = gradients(how)(u, log, state, (u, state))
    close(got[0], in_numpy(u, log, state, RESET), 1e-6)
    close(got[1], gradients("reference")(u, log, state, (u, state))[1], 1e-5)


def finite(tree, axes):
    """Whether all of each (B, T), or each B, is finite."""
    x = jnp.stack(jax.tree.leaves(tree))
    return np.isfinite(np.asarray(x)).all(axis=(0, *range(axes + 1, x.ndim)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("bad", ["u", "log", "state", "dx", "dstate"])
def test_a_bad_number_stays_in_its_document(bad, how):
    """Values are spoilt from there on, gradients up to there; another document has neither."""
    run, (u, log, state) = gradients(how), draw("by token")
    clean = run(u, log, state, (u, state))
    given = {"u": u, "log": log, "state": state, "dx": u, "dstate": state}
    given = jax.tree.map(np.copy, given)
    where = (0, 5) if bad in ("u", "log", "dx") else (0,)
    given[bad][0][where] = np.nan
    inputs = given["u"], given["log"], given["state"]
    cotangents = given["dx"], given["dstate"]
    (x, after), (du, dlog, dstate) = run(*inputs, cotangents)
    document = np.zeros((BATCH, TIME), bool)
    first, last = {"state": (0, 4), "dstate": (8, 12)}.get(bad, (4, 8))
    document[0, first:last] = True
    for got, true in ((x, clean[0][0]), (du, clean[1][0]), (dlog, clean[1][1])):
        assert finite(got, 2)[~document].all()
        kept = jax.tree.map(lambda x: np.asarray(x)[~document], (got, true))
        close(*kept, 1e-6)
    spoilt = {"u": 5, "log": 5, "state": 0}.get(bad)
    if spoilt is not None:
        assert not finite(x, 2)[0, spoilt:last].any()
    else:
        assert not finite(du, 2)[0, first : 6 if bad == "dx" else last].any()
        assert finite(x, 2).all()
    assert finite(after, 1).all() or bad == "dstate"
    assert finite(dstate, 1).tolist() == [True, True]


def test_the_state_of_bfloat16_tokens_is_float32():
    u, log, state = draw("constant", jnp.bfloat16)
    log, state = jax.tree.map(lambda x: np.float32(x), (log, state))
    (x, after), grads = gradients("xla")(u, log, state, (u, state))
    assert {z.dtype for z in (*x, *grads[0])} == {jnp.dtype(jnp.bfloat16)}
    assert {z.dtype for z in (*after, *jax.tree.leaves(grads[1:]))} == {jnp.dtype(jnp.float32)}
    rms((x, after), in_numpy(u, log, state, RESET), 3e-3)


def test_nothing_is_kept_but_the_outputs():
    """A gradient's temporaries are the state's, not a number for every token."""

    def temporaries(how):
        def both(u, log, state, cotangents):
            return gradients(how, None)(u, log, state, cotangents)

        u = (jax.ShapeDtypeStruct((1, 256, 64, 8), jnp.float32),) * 2
        log = (jax.ShapeDtypeStruct((8,), jnp.float32),) * 2
        state = (jax.ShapeDtypeStruct((1, 64, 8), jnp.float32),) * 2
        compiled = jax.jit(both).lower(u, log, state, (u, state)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (2 * 64 * 8 * 4)

    assert temporaries("reference") > 2 * 256
    assert temporaries("xla") < 16


@pytest.mark.parametrize("kind", ["constant", "by token"])
def test_a_summary_is_the_span_from_nothing(kind):
    """A thousand radians a token: its angle is the sum's, within a turn."""
    u, log, state = draw(kind, time=40, turns=400.0)
    reset = np.zeros((BATCH, 40), bool)
    reset[1, 30] = True
    flag, (total, x) = jax.jit(summary.summarize)(u, log, reset, state)
    np.testing.assert_array_equal(flag, [False, True])
    nothing = jax.tree.map(np.zeros_like, state)
    close(x, in_numpy(u, log, nothing, reset)[1], 1e-5)
    whole = np.broadcast_to(np.float64(log[0]) + 1j * np.float64(log[1]), (BATCH, 40, P))
    exact = np.stack([whole[0].sum(0), whole[1, 30:].sum(0)])
    close(total[0], exact.real, 1e-6)
    assert np.abs(total[1]).max() <= 3.2
    assert np.abs(np.exp(1j * np.float64(total[1])) - np.exp(1j * exact.imag)).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": ((2, 3, 4), (2, 3, 5))}, r"imaginary part of u has shape \(2, 3, 5\), not"),
        ({"u": ((2, 4), (2, 4))}, r"u has shape \(2, 4\); it needs batch, time and channels"),
        ({"u": ((2, 0, 4), (2, 0, 4))}, "holds no token"),
        ({"log_decay": ((5,), (5,))}, r"real part of log_decay has shape \(5,\), not \(4,\)"),
        ({"log_decay": ((4,), (2, 3, 4))}, "imaginary part of log_decay has shape"),
        ({"log_decay": ((2, 4, 4),) * 2}, r"shape \(2, 4, 4\), not \(2, 3, 4\)"),
        ({"state": ((2, 1, 4),) * 2}, r"state has shape \(2, 1, 4\), not \(2, 4\)"),
        ({"reset": (2, 4)}, r"reset has shape \(2, 4\), not \(2, 3\)"),
        ({"chunk": 0}, "chunk=0; it must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(unchecked, change, message):
    given = {"u": ((2, 3, 4),) * 2, "log_decay": ((4,),) * 2, "reset": (2, 3)} | change
    chunk, reset = given.pop("chunk", None), jnp.zeros(given.pop("reset"), bool)
    pairs = {
        name: tuple(jnp.zeros(shape, jnp.float32) for shape in pair) for name, pair in given.items()
    }
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**pairs, reset=reset, chunk=chunk)


def test_parts_that_do_not_belong_together_are_named(unchecked):
    u, log = jnp.zeros((1, 2, 3), jnp.float32), jnp.zeros(3, jnp.float32)
    with pytest.raises(ValueError, match="u's parts are float32 and bfloat16"):
        diagonal_scan((u, u.astype(jnp.bfloat16)), (log, log))
    with pytest.raises(ValueError, match="imaginary part of log_decay is int32; it must be one of"):
        diagonal_scan((u, u), (log, log.astype(jnp.int32)))
    with pytest.raises(ValueError, match="log_decay has 3 parts; it must have two"):
        diagonal_scan((u, u), (log, log, log))
