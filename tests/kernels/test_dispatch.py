"""A named implementation runs or says why not; unnamed, the first that accepts; record() tells."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import attention, fixed_query, linear_attention, selective_scan
from scanax.kernels.dispatch import Implementation, Target, call, on, record
from support.targets import INTERPRETED, TPU


@pytest.mark.parametrize("op", [linear_attention, selective_scan, attention, fixed_query])
def test_a_kernel_for_other_hardware_says_so(op):
    """On this CPU, on a GPU that is no Hopper, and on the hardware that it is for."""
    x, A = jnp.ones((1, 3, 2), jnp.float32), -jnp.ones((2, 2), jnp.float32)
    arguments = {
        linear_attention: (x[:, :, None],) * 3 + (jnp.zeros(1, jnp.float32),),
        selective_scan: (x, x, A, x, x),
        attention: (x[:, :, None],) * 3,
        fixed_query: (x[0], x[:, :, None], x[:, :, None]),
    }[op]

    def ran(**how):
        with record() as names:
            jax.eval_shape(lambda *x: op(*x, **how), *arguments)
        return names[0][1]

    assert ran() == "xla"
    with pytest.raises(NotImplementedError, match="pallas_tpu: it runs on TPUs, and this is cpu"):
        ran(implementation="pallas_tpu")
    with on(Target("gpu", "NVIDIA A100-SXM4-80GB", "8.0")):
        assert ran() == "xla"
        with pytest.raises(NotImplementedError, match="and this is NVIDIA A100"):
            ran(implementation="pallas_tpu")
    with on(TPU):
        assert ran() == "pallas_tpu"


def linear_of(dtypes, chunk=None):
    q, k, v = (jnp.zeros((1, 8, 1, 64), dtype) for dtype in dtypes)
    log = jnp.zeros(1, jnp.float32)
    linear_attention(q, k, v, log, chunk=chunk, implementation="pallas_tpu")


def attention_of(shape, keys, block=None, dtype=jnp.float32):
    q, k = jnp.zeros(shape, jnp.float32), jnp.zeros(keys, jnp.float32)
    index = jnp.zeros(shape[:2], jnp.int32)
    how = {"q_index": index, "block": block, "dtype": dtype, "implementation": "pallas_tpu"}
    jax.eval_shape(lambda q, k: attention(q, k, k, **how), q, k)


F16, F32 = jnp.float16, jnp.float32
TOO_MUCH = {
    "float32 or bfloat16, not float16": lambda: linear_of((F16, F16, F32)),
    "powers of two from 8 to 256, not 512": lambda: linear_of((F32,) * 3, 512),
    "it writes float32 or bfloat16": lambda: attention_of((1, 4, 1, 8), (1, 4, 1, 8), dtype=F16),
    "multiples of 16 tokens up to 512, not 8": lambda: attention_of((1, 4, 1, 8), (1, 4, 1, 8), 8),
    "up to 65536 tiles of all rows": lambda: attention_of((70_000, 2, 1, 8), (70_000, 2, 1, 8)),
    "multiples of 16 keys up to": lambda: attention_of((1, 1, 32, 128), (1, 512, 32, 128), 256),
    "no empty arrays": lambda: attention_of((0, 4, 1, 8), (0, 4, 1, 8)),
    "up to 65536 rows and tiles": lambda: attention_of((65_536, 1, 1, 8), (65_536, 8, 1, 8)),
}


@pytest.mark.parametrize("words", TOO_MUCH)
def test_what_a_tpu_has_no_room_for_is_refused(words):
    with on(TPU), pytest.raises(NotImplementedError, match=words):
        TOO_MUCH[words]()


def test_inputs_of_two_dtypes_lose_nothing():
    rng = np.random.default_rng(0)
    q, v = (jnp.asarray(rng.normal(size=(1, 16, 1, 8)), dtype) for dtype in (jnp.bfloat16, F32))
    log = jnp.full(1, -0.1, F32)
    expected, _ = linear_attention(q, q, v, log, implementation="reference")
    with on(INTERPRETED):
        y, _ = linear_attention(q, q, v, log, implementation="pallas_tpu")
    assert y.dtype == F32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_summed_as_they_are_multiplied():
    """One score 0 and 255 just above log(1/4), values of one: the mean is one, not 0.998."""
    k = jnp.full((1, 256, 1, 1), np.log(0.2505), jnp.bfloat16).at[0, 0].set(0)
    q, v = jnp.ones((1, 1, 1, 1), jnp.bfloat16), jnp.ones((1, 256, 1, 8), jnp.bfloat16)
    with on(INTERPRETED):
        for time in (1, 2):
            y = attention(
                jnp.repeat(q, time, axis=1), k, v, causal=False, implementation="pallas_tpu"
            )
            np.testing.assert_array_equal(np.asarray(y, np.float32), 1)


def test_pallas_is_imported_by_the_first_call_that_runs_it():
    """Whether a kernel takes a call is found out without its compiler."""
    code = """
import sys, jax.numpy as jnp
from scanax.kernels import attention, dispatch, fixed_query, linear_attention, selective_scan
x, A = jnp.zeros((1, 4, 1, 2), jnp.bfloat16), jnp.zeros((2, 2), jnp.float32)
with dispatch.on(dispatch.Target("gpu", "NVIDIA A100", "8.0")), dispatch.record() as ran:
    linear_attention(x, x, x, jnp.zeros(1, jnp.float32))
    selective_scan(*(x[:, :, 0],) * 2, A, *(x[:, :, 0],) * 2)
    attention(x, x, x)
    fixed_query(x[0, 0], x, x)
assert {name for _, name in ran} == {"xla"} and len(ran) == 4, ran
assert not [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def short_only(x):
    return None if x.shape[0] < 4 else f"length {x.shape[0]} is over 3"


FORMS = {
    "fast": Implementation(lambda x: 2 * x, short_only),
    "slow": Implementation(lambda x: x + x),
}
SHORT, LONG = np.ones(3, np.float32), np.ones(9, np.float32)


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [(None, SHORT, "fast"), (None, LONG, "slow"), ("slow", SHORT, "slow"), ("fast", SHORT, "fast")],
)
def test_the_one_that_runs(name, x, expected):
    with record() as ran:
        call("double", FORMS, name, x)
    assert ran == [("double", expected)]


def test_a_named_one_that_refuses_says_why_and_nothing_else_runs():
    with record() as ran, pytest.raises(NotImplementedError, match="fast: length 9 is over 3"):
        call("double", FORMS, "fast", LONG)
    assert ran == []


def test_an_unknown_name_lists_the_known():
    with pytest.raises(
        NotImplementedError, match=r"double has no implementation 'quick'.*fast, slow"
    ):
        call("double", FORMS, "quick", SHORT)


def test_all_refuse():
    forms = {n: Implementation(lambda x: x, lambda x, n=n: f"{n} cannot") for n in "ab"}
    with pytest.raises(NotImplementedError, match="a: a cannot; b: b cannot"):
        call("double", forms, None, SHORT)


def test_records_nest_and_end():
    with record() as outer:
        call("double", FORMS, None, SHORT)
        with record() as inner:
            call("double", FORMS, None, LONG)
    call("double", FORMS, None, SHORT)
    assert inner == [("double", "slow")]
    assert outer == [("double", "fast"), ("double", "slow")]


def test_a_compiled_function_is_listed_when_traced():
    double = jax.jit(lambda x: call("double", FORMS, None, x))
    with record() as first:
        double(SHORT)
    with record() as second:
        double(SHORT)
    assert (first, second) == ([("double", "fast")], [])


def linear(**how):
    x, log = jnp.ones((1, 3, 1, 2), jnp.float32), jnp.zeros(1, jnp.float32)
    reset = jnp.zeros((1, 3), bool)
    jax.eval_shape(lambda x: linear_attention(x, x, x, log, reset=reset, **how), x)


def selective(**how):
    x, A = jnp.ones((1, 3, 2), jnp.float32), -jnp.ones((2, 2), jnp.float32)
    jax.eval_shape(lambda x: selective_scan(x, x, A, x, x, **how), x)


@pytest.mark.parametrize("op", [linear, selective])
def test_operations_run_what_was_asked(op):
    name = {linear: "linear_attention", selective: "selective_scan"}[op]
    for asked in ("reference", "associative", "xla"):
        with record() as ran:
            op(implementation=asked)
        assert ran == [(name, asked)]
    with record() as ran:
        op()
    assert ran == [(name, "xla")]
    with pytest.raises(NotImplementedError, match=f"{name} has no implementation 'cuda'"):
        op(implementation="cuda")
