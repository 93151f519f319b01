"""Linear attention against other code's numbers, and what it says of wrong arguments."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import dispatch, linear_attention
from scanax.kernels.linear_attention import xla
from support.compare import close

CASES = Path(__file__).parents[1] / "parity"


def arrays(case, name):
    return {k: jnp.asarray(v) for k, v in np.load(CASES / case / f"{name}.npz").items()}


def run(q, k, v, log_decay, state=None):
    """The cases of fla scale the queries; here that is the layer's business."""
    return linear_attention(q * q.shape[-1] ** -0.5, k, v, log_decay, state=state)


@pytest.mark.parametrize(("case", "decay"), [("op_gla", "gk"), ("op_simple_gla", "g")])
def test_gated_linear_attention_of_fla(case, decay):
    inputs, expected, grads = (arrays(case, n) for n in ("inputs", "expected", "grads"))
    names = ("q", "k", "v", decay, "initial_state")
    out, pull = jax.vjp(run, *(jnp.asarray(inputs[n]) for n in names))
    close(out, (expected["o"], expected["final_state"]), 2e-6)
    close(pull((inputs["ct"], inputs["cs"])), tuple(grads[f"d{n}"] for n in names), 1e-5)


def test_retention_of_fla():
    inputs, expected = arrays("op_retention", "inputs"), arrays("op_retention", "expected")
    out = run(**inputs)
    close(out, (expected["o"], expected["final_state"]), 2e-6)
    close(out[0], expected["o_recurrent"], 2e-6)
    constant = run(**inputs | {"log_decay": inputs["log_decay"][0, 0]})
    close(constant, (expected["o"], expected["final_state"]), 2e-6)


def test_lightning_attention():
    inputs, expected, grads = (
        arrays("op_lightning_attn", n) for n in ("inputs", "expected", "grads")
    )
    q, k, v, ct = (inputs[n].swapaxes(1, 2) for n in ("q", "k", "v", "ct"))
    slopes = inputs["slopes"].reshape(-1)
    (y, state), pull = jax.vjp(lambda *x: linear_attention(*x, -slopes), q, k, v)
    close(y.swapaxes(1, 2), expected["o"], 2e-6)
    close(state, expected["final_state"], 2e-6)
    got = (d.swapaxes(1, 2) for d in pull((ct, jnp.zeros_like(state))))
    close(tuple(got), tuple(grads[n] for n in ("dq", "dk", "dv")), 1e-5)
    close(
        linear_attention(q, k, v, jnp.zeros_like(slopes))[0].swapaxes(1, 2),
        expected["o_no_decay"],
        2e-6,
    )


def test_memory_is_one_state_a_chunk():
    """The backward keeps T / chunk states, and no T x T or T states beside its inputs."""
    B, T, H, K = 1, 4096, 2, 64
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)

    def loss(q, k, v, g):
        return linear_attention(q, k, v, g, chunk=64)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, x).compile()
    one_array, states = 4 * B * T * H * K, 4 * B * (T // 64) * H * K * K
    # y and its cotangent, gradients, the states, and what is left of one step.
    assert compiled.memory_analysis().temp_size_in_bytes <= 9 * one_array + 2 * states


@pytest.mark.parametrize(
    ("sizes", "rows", "chunk"),
    [
        ((1, 65536, 2), (1, 8, 32), 32),  # one long row: several chunks of it
        ((4, 512, 8), (1, 2, 32), 32),  # a row after the other, read where it lies
        ((256, 32, 2), (8, 1, 32), 32),  # short rows: several of them
        ((6, 40, 2), (2, 3, 16), 16),  # as many as divide the batch
        ((64, 1, 4), (64, 1, 1), 16),  # a token of each
        ((67, 1, 4), (67, 1, 1), 16),  # and of a batch that nothing divides
        ((1, 2048, 32), (1, 1, 32), 32),  # more heads than that: one chunk
        ((7, 100, 1), (7, 4, 32), 32),  # 7 rows are nearer to the 4 that fit than 1 is
    ],
)
def test_a_step_takes_as_much_of_every_shape(sizes, rows, chunk):
    B, T, _ = sizes
    (b, m, c) = found = xla._sizes(*sizes, chunk, 16 * chunk)
    assert found == rows
    assert B % b == 0 and (b == 1 or m * c >= T)
    assert xla._sizes(*sizes, chunk, 0) == (B, 1, min(T, chunk))


@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_blocks_of_rows_and_chunks_are_the_recurrence(monkeypatch, at_once, decay):
    monkeypatch.setattr(xla, "AT_ONCE", at_once)
    for B, T, H, G in ((4, 23, 2, 1), (6, 7, 1, 1), (1, 41, 2, 2)):
        keys = jax.random.split(jax.random.key(B), 8)
        q, k = (jax.random.normal(key, (B, T, G, 3)) for key in keys[:2])
        v, state = (
            jax.random.normal(keys[2], (B, T, H, 4)),
            jax.random.normal(keys[3], (B, H, 3, 4)),
        )
        shape = {"constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, 3)}[decay]
        log = -jax.nn.softplus(jax.random.normal(keys[4], shape))
        reset = jax.random.bernoulli(keys[5], 0.1, (B, T))
        cotangents = jax.random.normal(keys[6], v.shape), jax.random.normal(keys[7], state.shape)

        def both(implementation, *inputs, reset=reset, cotangents=cotangents):
            def of(*inputs):
                how = {"implementation": implementation, "reset": reset}
                how |= {"chunk": 4} if implementation == "xla" else {}
                return linear_attention(*inputs[:4], state=inputs[4], **how)

            y, pull = jax.vjp(of, *inputs)
            return y, pull(cotangents)

        y, gradients = jax.jit(both, static_argnums=0)("xla", q, k, v, log, state)
        expected, slopes = jax.jit(both, static_argnums=0)("reference", q, k, v, log, state)
        close(y, expected, 2e-6)
        close(gradients, slopes, 1e-5)


@pytest.mark.parametrize("shape", [(2,), (0, 5, 2), (0, 5, 2, 3)], ids=len)
def test_an_empty_batch_gives_empty_arrays(shape):
    x, log = jnp.zeros((0, 5, 2, 3)), jnp.zeros(shape)
    (y, state), pull = jax.vjp(linear_attention, x, x, x, log)
    assert y.shape == x.shape and state.shape == (0, 2, 3, 3)
    *gradients, slope = pull((y, state))
    assert all(each.shape == x.shape for each in gradients)
    assert slope.shape == shape and not slope.any()


def arguments(**change):
    x = jnp.zeros((2, 6, 4, 3), jnp.float32)
    return {"q": x, "k": x, "v": x, "log_decay": jnp.zeros(4, jnp.float32)} | change


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((2, 5, 4, 3))}, r"differ in batch or length"),
        ({"k": np.zeros((2, 6, 4, 2))}, r"q has 3 features and k 2"),
        ({"v": np.zeros((2, 6, 3, 3))}, r"v has 3 heads, which does not divide 4"),
        ({"log_decay": np.zeros((2, 6, 4, 2))}, r"log_decay has shape \(2, 6, 4, 2\)"),
        ({"state": np.zeros((2, 4, 3, 2))}, r"state has shape \(2, 4, 3, 2\), not \(2, 4, 3, 3\)"),
        ({"reset": np.zeros((2, 5), bool)}, r"reset has shape \(2, 5\), not \(2, 6\)"),
        ({"chunk": 0}, r"chunk=0; it must be at least 1"),
        ({"chunk": "16"}, r"chunk='16'; it must be a whole number"),
        ({"v": np.zeros((2, 6, 4, 3), np.int32)}, r"v is int32; it must be one of bfloat16, "),
        ({"q": np.zeros((2, 6, 3))}, r"q has shape \(2, 6, 3\); it must have 4 axes"),
        ({"log_decay": np.float32(0)}, r"log_decay has shape \(\); it must have 1 or 3 or 4 axes"),
        (dict.fromkeys("qkv", np.zeros((2, 0, 4, 3))), r"holds no token"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments(**change))


def test_an_implementation_is_named_or_refused():
    with pytest.raises(NotImplementedError, match=r"no implementation 'cuda'; it has .*xla"):
        linear_attention(**arguments(), implementation="cuda")
    with dispatch.record() as ran:
        linear_attention(**arguments())
        linear_attention(**arguments(), implementation="reference")
    assert ran == [("linear_attention", "xla"), ("linear_attention", "reference")]
