"""Every operation that has kernels, at the widths of real models: what is lowered and compiled."""

from functools import partial

import jax
import jax.numpy as jnp
from scanax.kernels import attention, fixed_query, linear_attention, selective_scan

WIDTHS, TIME, BATCH, HEADS, GROUPS = (64, 128, 256), 8192, 1, 4, 2
KINDS = ("vector", "scalar", "constant")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def pulled(run):
    """The values and, from cotangents of ones, the gradients to every argument."""

    def call(*args):
        out, pull = jax.vjp(run, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return call


def linear_case(kind, implementation, width, values, dtype):
    logs = {
        "vector": (BATCH, TIME, HEADS, width),
        "scalar": (BATCH, TIME, HEADS),
        "constant": (HEADS,),
    }
    arrays = (
        shape(BATCH, TIME, HEADS, width, dtype=dtype),
        shape(BATCH, TIME, GROUPS, width, dtype=dtype),
        shape(BATCH, TIME, HEADS, values, dtype=dtype),
        shape(*logs[kind]),
        shape(BATCH, HEADS, width, values),
    )

    def run(reset, *args):
        op = partial(linear_attention, reset=reset, implementation=implementation)
        return pulled(lambda q, k, v, log, state: op(q, k, v, log, state=state))(*args)

    return run, arrays


def fixed_query_case(implementation, width, values, dtype):
    tokens = [shape(BATCH, TIME, GROUPS, n, dtype=dtype) for n in (width, values)]
    state = shape(BATCH, HEADS), shape(BATCH, HEADS), shape(BATCH, HEADS, values)

    def run(reset, *args):
        op = partial(fixed_query, reset=reset, implementation=implementation)
        return pulled(lambda q, k, v, state: op(q, k, v, state=state))(*args)

    return run, (shape(HEADS, width, dtype=dtype), *tokens, state)


def attention_case(implementation, width, values, dtype):
    keys = [shape(BATCH, TIME, GROUPS, n, dtype=dtype) for n in (width, values)]

    def run(reset, *args):
        op = partial(
            attention, reset=reset, window=4096, return_lse=True, implementation=implementation
        )
        return pulled(op)(*args)

    return run, (shape(BATCH, TIME, HEADS, width, dtype=dtype), *keys)


def decode_case(implementation, width, values, dtype):
    keys = [shape(BATCH, TIME, GROUPS, n, dtype=dtype) for n in (width, values)]

    def run(reset, q, k, v, index):
        del reset
        return attention(q, k, v, q_index=index, return_lse=True, implementation=implementation)

    query = shape(BATCH, 1, HEADS, width, dtype=dtype)
    return run, (query, *keys, shape(BATCH, 1, dtype=jnp.int32))


def selective_case(implementation, width, values, dtype):
    """`width` channels of four heads, and 16 states; delta is in float32, as a layer has it."""
    assert values == width, "it has no values"
    tokens = shape(BATCH, TIME, 4 * width, dtype=dtype), shape(BATCH, TIME, 4 * width)
    shared = (shape(BATCH, TIME, 16, dtype=dtype),) * 2

    def run(reset, u, delta, A, B, C, D, state):
        op = partial(selective_scan, reset=reset, implementation=implementation)
        return pulled(lambda *x: op(*x[:5], D=x[5], state=x[6]))(u, delta, A, B, C, D, state)

    state = shape(4 * width, 16), *shared, shape(4 * width), shape(BATCH, 4 * width, 16)
    return run, (*tokens, *state)


CASES = {
    **{f"linear_attention {kind}": partial(linear_case, kind) for kind in KINDS},
    "attention": attention_case,
    "decode": decode_case,
    "fixed_query": fixed_query_case,
    "selective_scan": selective_case,
}


def case(name, implementation, width, values, dtype, packed):
    """(function, shapes) of values and gradients; packed, `reset` is data too."""
    run, arrays = CASES[name](implementation, width, values, dtype)
    if packed:
        return run, (shape(BATCH, TIME, dtype=jnp.bool_), *arrays)
    return partial(run, None), arrays
