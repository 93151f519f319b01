"""What a compiled program does is counted with its loops; what a mixer exchanges is a formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.kernels.monoid import DECAY
from scanax.layers.conv import ShortConv
from scanax.sharding import hlo, mesh, ops, sequence

ROWS, DEVICES = 2, 8


@pytest.mark.parametrize("layers", [10, 40])
def test_a_loop_counts_as_often_as_it_runs(layers):
    def forward(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = (16, 32), (layers, 32, 32)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counted = hlo.count(jax.jit(forward).lower(*arguments).compile().as_text())
    work = layers * 16 * 32 * (2 * 32 + 1)
    assert work <= counted.flops <= 1.02 * work  # the loop's own counter, and what tanh is made of


def test_collectives_inside_a_loop():
    def local(x):
        def body(x, _):
            return jax.lax.psum(x, "seq") / 8, jax.lax.all_gather(x, "seq").sum(0)

        return jax.lax.scan(body, x, length=5)

    with jax.set_mesh(mesh.make("seq=8")):
        spread = sequence.manual(local, jax.P("seq"), jax.P("seq"))
        compiled = jax.jit(spread).lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile()
    counted = hlo.count(compiled.as_text())
    own = 8 * 4 * 4  # bytes
    assert counted.calls == {"all-reduce": 5, "all-gather": 5}
    assert counted.received == {"all-reduce": 5 * 2 * 7 / 8 * own, "all-gather": 5 * 7 * own}


@pytest.mark.parametrize(("method", "sent"), [("scan", 3), ("ring", 1)])
def test_exchanges_by_pairs(method, sent):
    """What a device receives of a summary: ceil(log2 8) of them, or one."""

    def local(x):
        log, state = sequence.across(DECAY, (x[:, 0], x), "seq", method)
        return log[:, None] + state

    with jax.set_mesh(mesh.make("seq=8")):
        spread = sequence.manual(local, jax.P("seq"), jax.P("seq"))
        compiled = jax.jit(spread).lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile()
    counted = hlo.count(compiled.as_text())
    assert counted.received == {"collective-permute": sent * 8 * (4 + 1) * 4}


def linear(logs, time, heads=4, key=8, value=6):
    shapes = [(ROWS, time, heads, width) for width in (key, key, value)]
    log = {"constant": (heads,), "scalar": (heads,), "vector": (heads, key)}[logs]
    summary = 4 * ROWS * (heads * key * value + np.prod(log))
    shapes.append(log if logs == "constant" else (ROWS, time, *log))
    return ops.linear_attention, shapes, summary, 4 * ROWS * heads * key * value


def selective(time, width=12, state=4):
    shapes = [(ROWS, time, width), (ROWS, time, width), (width, state)]
    shapes += [(ROWS, time, state)] * 2
    summary = 4 * ROWS * width * (state + 1)
    return ops.selective_scan, shapes, summary, 4 * ROWS * width * state


def fixed(time, heads=4, key=8, value=6):
    shapes = [(heads, key), (ROWS, time, heads, key), (ROWS, time, heads, value)]
    summary = 4 * ROWS * heads * (2 + value)
    return ops.fixed_query, shapes, summary, summary


def diagonal(kind, time, image=(3, 2), channels=8):
    shapes = [(ROWS, time, *image, channels)] * 2
    shapes += [(channels,) if kind == "constant" else (ROWS, time, channels)] * 2
    state = 2 * 4 * ROWS * int(np.prod(image)) * channels

    def op(re, im, log_re, log_im, **how):
        x, state = ops.diagonal_scan((re, im), (log_re, log_im), **how)
        return x[0] * x[1], state

    return op, shapes, state + 2 * 4 * ROWS * channels, state


MIXERS = {
    "convs5": functools.partial(diagonal, "constant"),
    "s5": functools.partial(diagonal, "by token"),
    "retention, lightning": functools.partial(linear, "constant"),
    "mamba2": functools.partial(linear, "scalar"),
    "gla": functools.partial(linear, "vector"),
    "mamba": selective,
    "aaren": fixed,
}


def exchanged(op, shapes, time, *, final=False, gradient=False):
    """Bytes that a device receives, by kind of collective."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    reset = jax.ShapeDtypeStruct((ROWS, time), bool)

    def forward(*args):
        y, state = op(*args[:-1], reset=args[-1])
        return (y, state) if final else y

    call = forward
    if gradient:
        call = jax.grad(lambda *args: jnp.sin(forward(*args)).sum(), range(len(shapes)))
    with jax.set_mesh(mesh.make(f"seq={DEVICES}")):
        compiled = jax.jit(call).lower(*arguments, reset).compile()
    return hlo.count(compiled.as_text()).received


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_exchanged_is_one_summary_however_long_the_sequence(name):
    """Forward P - 1 summaries (state and log in float32, a flag); backward as much, flags aside.

    Shared arrays' gradients are summed over the devices besides. A final state costs one more.
    """
    for time in (64, 1024):
        op, shapes, summary, state = MIXERS[name](time)
        forward = exchanged(op, shapes, time)
        assert forward == {"all-gather": (DEVICES - 1) * (summary + ROWS)}
        both = exchanged(op, shapes, time, gradient=True)
        shared = 4 * sum(np.prod(s) for s in shapes if s[0] != ROWS)
        expected = forward | {"reduce-scatter": (DEVICES - 1) * summary}
        expected["all-reduce"] = 2 * (DEVICES - 1) / DEVICES * shared
        assert {kind: size for kind, size in expected.items() if size} == both
    forward = exchanged(op, shapes, time, final=True)
    assert forward["all-reduce"] == 2 * (DEVICES - 1) / DEVICES * state


def test_a_convolution_tells_its_neighbour_its_last_inputs():
    """Forward and backward B (taps - 1) D numbers each, however long the sequence."""
    conv, weights = nnx.split(ShortConv(12, 4, bias=False, rngs=nnx.Rngs(0)))
    for time in (64, 1024):
        x = jax.ShapeDtypeStruct((ROWS, time, 12), jnp.float32)
        reset = jax.ShapeDtypeStruct((ROWS, time), bool)

        def forward(x, reset):
            return nnx.merge(conv, weights)(x, None, reset)[0]

        def both(x, reset):
            return jax.grad(lambda x: jnp.sin(forward(x, reset)).sum())(x)

        for call, times in ((forward, 1), (both, 2)):
            with jax.set_mesh(mesh.make(f"seq={DEVICES}")):
                text = jax.jit(call).lower(x, reset).compile().as_text()
            assert hlo.count(text).received == {"collective-permute": times * ROWS * 3 * 12 * 4}


TPU = """HloModule step, is_scheduled=true, num_partitions=4

%below (counter: (s32[], f32[4])) -> pred[] {
  %counter = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %layers = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%counter), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %layers), direction=LT
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %x = f32[4]{0:T(128)} get-tuple-element(%carry), index=1
  %begun = f32[16]{0:T(128)} all-gather(%x), replica_groups={{0,1,2,3}}, metadata={chain_id="0"}
  %ended = f32[16]{0:T(128)} all-gather(%x), replica_groups={{0,1,2,3}}, metadata={chain_id="0"}
  %other = f32[16]{0:T(128)} all-gather(%x), replica_groups={{0,1,2,3}}
  ROOT %next = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%i, %x)
}

ENTRY %main (start: (s32[], f32[4])) -> (s32[], f32[4]) {
  %start = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%start), condition=%below, body=%body
}
"""


def test_a_tpus_loops_and_exchanges_in_pieces():
    """Its compiler notes no trip counts, and spreads one exchange over several fusions."""
    counted = hlo.count(TPU)
    assert counted.unknown == 0
    assert counted.calls == {"all-gather": 2 * 24}
    assert counted.received == {"all-gather": 2 * 24 * 3 * 16}
    assert hlo.count(TPU.replace("constant(24)", "parameter(1)")).unknown == 1
