"""Every schedule of every mixer is the token recurrence: values and all gradients."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ladder import BARS, BY_NAME, check, problem, resets, with_gradients
from support.mixers import BATCH, CASES, MIXERS
from support.targets import tracing

pytestmark = pytest.mark.core

TIME = 131  # prime, so that no chunk divides it
LAWS = [
    (mixer.name, i, dtype)
    for mixer in MIXERS
    for i, how in enumerate(mixer.schedules)
    for dtype in BARS
    if dtype == jnp.float32 or "pallas" not in how["implementation"]  # they have no float64
]
FAST = sorted({(name, BY_NAME[name].schedules[i]["implementation"]) for name, i, _ in LAWS})
FAST = [(name, how) for name, how in FAST if how in ("xla", "pallas_tpu")]


def name_of(law):
    name, i, dtype = law
    return "-".join(map(str, (name, *BY_NAME[name].schedules[i].values(), dtype.__name__)))


@pytest.mark.parametrize("law", LAWS, ids=name_of)
def test_schedule_is_the_recurrence(law):
    mixer, how, dtype = BY_NAME[law[0]], BY_NAME[law[0]].schedules[law[1]], law[2]
    time = 37 if how["implementation"] == "associative" else TIME  # it compiles in log2(T) parts
    with jax.enable_x64(dtype == jnp.float64), tracing(how["implementation"]):
        run = with_gradients(lambda x, reset: mixer.run(x, reset, **how))
        for case in CASES:
            for packed in (True, False):
                inputs, ct, reset, answer = problem(mixer.name, case, dtype, time, packed)
                check(mixer, case, dtype, run(inputs, ct, reset), answer)


@pytest.mark.parametrize("time", [1, 2, 37])
@pytest.mark.parametrize(("name", "implementation"), FAST)
def test_short_rows_without_documents(name, implementation, time):
    """`reset=None` takes its own path; the default chunk, whatever the length."""
    mixer = BY_NAME[name]
    run = with_gradients(lambda x, _: mixer.run(x, None, implementation=implementation))
    with tracing(implementation):
        for case in CASES:
            inputs, ct, reset, answer = problem(name, case, jnp.float32, time, packed=False)
            check(mixer, case, jnp.float32, run(inputs, ct, reset), answer)


@pytest.mark.parametrize("name", BY_NAME)
def test_packed_documents_are_separate_ones(name):
    """A row of documents gives what each gives alone, the first with the initial state."""
    mixer, rng = BY_NAME[name], np.random.default_rng(5)
    lengths = (19, 1, 40, 19)  # equal lengths share a compilation
    f32 = jax.tree.map(lambda x: np.asarray(x, np.float32), mixer.draw(rng, sum(lengths), "mixed"))
    begins = np.cumsum((0, *lengths[:-1]))
    reset = np.zeros((BATCH, sum(lengths)), bool)
    reset[:, begins[1:]] = True
    run = jax.jit(mixer.run)
    y, state = run(f32, reset)
    for begin, length in zip(begins, lengths, strict=True):
        part = f32 | {"tokens": jax.tree.map(lambda x: x[:, begin : begin + length], f32["tokens"])}  # noqa: B023
        first = np.zeros((BATCH, length), bool)
        first[:, 0] = begin > 0
        alone, state_alone = run(part, first)
        expected = np.asarray(alone, np.float64)
        error = np.abs(y[:, begin : begin + length] - expected).max() / np.abs(expected).max()
        assert error <= 1e-5, (begin, error)
    for x, true in zip(jax.tree.leaves(state), jax.tree.leaves(state_alone), strict=True):
        assert np.abs(x - true).max() <= 1e-5 * np.abs(true).max()


@pytest.mark.parametrize("name", [m.name for m in MIXERS if m.name.count("attention") == 0])
def test_prefill_then_decode_is_the_whole(name):
    """State out is state in: pieces of any length, single tokens last, give the row at once."""
    mixer, rng = BY_NAME[name], np.random.default_rng(6)
    time, cuts = 47, (0, 19, 38, 43, 44, 45, 46, 47)
    f32 = jax.tree.map(lambda x: np.asarray(x, np.float32), mixer.draw(rng, time, "mixed"))
    reset = resets(rng, time)
    run = jax.jit(mixer.run)
    y, final = run(f32, reset)
    state, pieces = f32["state"], []
    for begin, end in pairwise(cuts):
        part = {
            "tokens": jax.tree.map(lambda x: x[:, begin:end], f32["tokens"]),  # noqa: B023
            "shared": f32["shared"],
            "state": state,
        }
        piece, state = run(part, reset[:, begin:end])
        pieces.append(piece)
    whole = np.concatenate(pieces, axis=1)
    assert np.abs(whole - y).max() <= 1e-5 * np.abs(y).max()
    for x, true in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        assert np.abs(x - true).max() <= 1e-5 * np.abs(true).max()


@pytest.mark.parametrize(("name", "implementation"), FAST)
def test_bfloat16_inputs(name, implementation):
    """Against float64 of the same rounded inputs, in root-mean-square ratio.

    Rounding the exact answer to bfloat16 alone makes 0.0017; the gradient of a softmax subtracts.
    Kernels round what goes into a matrix unit as well.
    """
    mixer, bars = BY_NAME[name], (0.003, 0.004) if implementation == "xla" else (0.005, 0.006)
    inputs, (dy, dstate), reset, (true, true_gradients) = problem(name, "mild", jnp.bfloat16, TIME)

    def exact(tree):
        return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)

    inputs = inputs | {"state": exact(inputs["state"])}
    run = with_gradients(lambda *x: mixer.run(*x, implementation=implementation))
    with tracing(implementation):
        (y, state), gradients = run(inputs, (dy, exact(dstate)), reset)
    assert y.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    pairs = ((y, state), true), (gradients, true_gradients)
    for bar, (ours, theirs) in zip(bars, pairs, strict=True):
        for x, z in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            error = np.sqrt(np.mean((np.asarray(x, np.float64) - z) ** 2))
            assert error <= bar * np.sqrt(np.mean(z**2)), error
