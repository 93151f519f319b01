"""Every implementation is a loop over groups, whatever the sizes; rows past them are not there."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import grouped_matmul
from scanax.kernels.dispatch import on, record
from scanax.kernels.grouped_matmul import megablox, xla
from scanax.sharding import hlo
from support.compare import close, rms
from support.targets import HOPPER, TPU, tracing

NAMES = ("xla", "ragged", "reference")
ALL = (*NAMES, "megablox")
BARS = {jnp.float32: (1e-5, 1e-4), jnp.float64: (1e-10, 1e-10)}
RUNS = [(name, jnp.float32) for name in ALL] + [(name, jnp.float64) for name in NAMES]
ROWS = 61  # prime
SIZES = {
    "mixed": [9, 1, 17, 8, 0, 24, 2],
    "all in one": [0, 0, 0, 61, 0, 0, 0],
    "all in the first": [61, 0, 0, 0, 0, 0, 0],
    "all in the last": [0, 0, 0, 0, 0, 0, 61],
    "the first empty": [0, 5, 9, 0, 0, 40, 7],
    "the last empty": [33, 1, 1, 1, 20, 5, 0],
    "fewer than the rows": [3, 0, 31, 2, 0, 9, 1],
    "one row": [0, 0, 0, 1, 0, 0, 0],
    "none": [0, 0, 0, 0, 0, 0, 0],
}
SHAPES = {  # rows: sizes
    "one row of many": [[0, 1, 0], [0, 0, 0]],
    "one group": [[37], [31]],
    "64 groups": [[3, 1] * 32, [0, 4] * 32, [127] + [0] * 62 + [1], [0, 0, 2, 0] * 16],
    "two tiles": [[100, 157], [0, 257], [129, 0], [127, 1]],
}


def draw(rng, rows, sizes, transpose, width=12, hidden=20):
    """x, w, sizes and a cotangent; rows past the groups are nan in x and in the cotangent."""
    groups, past = len(sizes), np.arange(rows)[:, None] >= sum(sizes)
    x = np.where(past, np.nan, rng.normal(size=(rows, width)))
    w = rng.normal(size=(groups, hidden, width) if transpose else (groups, width, hidden))
    ct = np.where(past, np.nan, rng.normal(size=(rows, hidden)))
    return x, w, np.asarray(sizes, np.int32), ct


def by_hand(x, w, sizes, ct, transpose):
    """y and the gradients to x and w, group after group, of the inputs in float64."""
    x, w, ct = (np.asarray(a, np.float64) for a in (x, w, ct))
    w = np.swapaxes(w, 1, 2) if transpose else w
    y, dx, dw = np.zeros(ct.shape), np.zeros(x.shape), np.zeros(w.shape)
    begin = 0
    for e, size in enumerate(sizes):
        mine = slice(begin, begin := begin + size)
        y[mine], dx[mine], dw[e] = x[mine] @ w[e], ct[mine] @ w[e].T, x[mine].T @ ct[mine]
    return y, (dx, np.swapaxes(dw, 1, 2) if transpose else dw)


@cache
def implementation(name, transpose):
    """(y, gradients to x and w) as one compiled function, of which the sizes are data."""

    @jax.jit
    def both(x, w, sizes, ct):
        how = {"transpose": transpose, "implementation": name}
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **how), x, w)
        return y, pull(ct)

    def traced(*args):
        with tracing(name):
            return both(*args)

    return traced


def cast(problem, dtype):
    x, w, sizes, ct = problem
    return x.astype(dtype), w.astype(dtype), sizes, ct.astype(dtype)


def check(name, transpose, problem, dtype):
    got = implementation(name, transpose)(*problem)
    assert all(a.dtype == dtype for a in jax.tree.leaves(got))
    y, gradients = by_hand(*problem, transpose)
    value_bar, gradient_bar = BARS[dtype]
    close(got[0], y, value_bar)
    close(got[1], gradients, gradient_bar)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_it_is_a_loop_over_groups(name, dtype, transpose):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == jnp.float64):
        for sizes in SIZES.values():
            problem = cast(draw(rng, ROWS, sizes, transpose), dtype)
            check(name, transpose, problem, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_any_number_of_rows_and_groups(name, shape):
    rng = np.random.default_rng(1)
    rows = max(map(sum, SHAPES[shape]))
    for sizes in SHAPES[shape]:
        problem = cast(draw(rng, rows, sizes, False), np.float32)
        check(name, False, problem, jnp.float32)


@pytest.mark.parametrize(("dtype", "x64"), [(jnp.bfloat16, True), (jnp.float32, False)])
@pytest.mark.parametrize("name", ALL)
def test_bfloat16_rows_and_weights_of_either_dtype(name, dtype, x64):
    """The gradient to w has the dtype of w and is rounded once, to that."""
    rng = np.random.default_rng(2)
    x, w, sizes, ct = cast(draw(rng, ROWS, SIZES["mixed"], False), jnp.bfloat16)
    with jax.enable_x64(x64):
        got = implementation(name, False)(x, w.astype(dtype), sizes, ct)
    assert [a.dtype for a in jax.tree.leaves(got)] == [jnp.bfloat16, jnp.bfloat16, dtype]
    y, (dx, dw) = by_hand(x, w, sizes, ct, False)
    rms(got, (y, (dx, dw)), 0.003)
    if dtype == jnp.float32:
        close(got[1][1], dw, 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_weights_under_float32_rows(name):
    rng = np.random.default_rng(3)
    x, w, sizes, ct = draw(rng, ROWS, SIZES["mixed"], False)
    x, w, ct = (np.asarray(a, np.float32) for a in (x, w.astype(jnp.bfloat16), ct))
    got = implementation(name, False)(x, w.astype(jnp.bfloat16), sizes, ct)
    assert [a.dtype for a in jax.tree.leaves(got)] == [jnp.float32, jnp.float32, jnp.bfloat16]
    y, (dx, dw) = by_hand(x, w, sizes, ct, False)
    close((got[0], got[1][0]), (y, dx), 1e-5)
    rms(got[1][1], dw, 0.003)


@pytest.mark.parametrize("transpose", [False, True])
def test_widths_that_fill_no_tile(transpose):
    """More than one tile of columns, the last one short."""
    rng = np.random.default_rng(4)
    problem = draw(rng, 9, [5, 3], transpose, megablox.COLUMNS + 9, megablox.COLUMNS + 3)
    check("megablox", transpose, cast(problem, np.float32), jnp.float32)


@pytest.mark.parametrize("name", ALL)
def test_a_nan_stays_in_its_group(name):
    """In one row of x it reaches that row of y and that group's dw; in a cotangent, dx and dw."""
    rng = np.random.default_rng(5)
    x, w, sizes, ct = cast(draw(rng, ROWS, SIZES["mixed"], False), np.float32)
    clean = jax.tree.map(np.asarray, implementation(name, False)(x, w, sizes, ct))
    x[3, 5], ct[12, 1] = np.nan, np.nan  # of groups 0 and 2
    y, (dx, dw) = jax.tree.map(np.asarray, implementation(name, False)(x, w, sizes, ct))
    reached = [np.isnan(a).any(tuple(range(1, a.ndim))) for a in (y, dx, dw)]
    assert [list(np.flatnonzero(a)) for a in reached] == [[3], [12], [0, 2]]
    for a, b, nan in zip((y, dx, dw), jax.tree.leaves(clean), reached, strict=True):
        np.testing.assert_array_equal(a[~nan], b[~nan])


def test_reference_differentiates_any_way():
    rng = np.random.default_rng(6)
    x, w, sizes, ct = cast(draw(rng, ROWS, SIZES["fewer than the rows"], False), np.float32)
    x, ct = np.nan_to_num(x), np.nan_to_num(ct)
    group = np.repeat(np.arange(len(sizes)), sizes)

    def gathered(x, w):
        return jnp.einsum("mk,mkn->mn", x[: len(group)], w[group], precision="highest")

    def reference(x, w):
        return grouped_matmul(x, w, jnp.asarray(sizes), implementation="reference")

    def curvature(run):
        slope = jax.grad(lambda x, w: (run(x, w) ** 2).sum(), (0, 1))
        return jax.jvp(slope, (x, w), (ct[:, : x.shape[1]], jnp.ones_like(w)))[1]

    close(*jax.jit(lambda: (curvature(reference), curvature(gathered)))(), 1e-4)


def test_what_runs_where():
    x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.asarray([1, 3])

    def ran(dtype, **how):
        with record() as names:
            jax.eval_shape(
                lambda x, w, s: grouped_matmul(x, w, s, **how), x.astype(dtype), w, sizes
            )
        return names[0][1]

    assert ran(jnp.float32) == "xla"
    assert [ran(jnp.float32, implementation=name) for name in NAMES] == list(NAMES)
    with pytest.raises(NotImplementedError, match="megablox: it runs on TPUs, and this is cpu"):
        ran(jnp.float32, implementation="megablox")
    with on(HOPPER):
        assert ran(jnp.float32) == "ragged"
    with on(TPU):
        assert ran(jnp.bfloat16) == "megablox"
        assert ran(jnp.float16) == "xla"
        with pytest.raises(NotImplementedError, match="float32 or bfloat16, not float16"):
            ran(jnp.float16, implementation="megablox")


def gradients(run, rows, groups, width, hidden, dtype=jnp.float32):
    """The traced gradients to x and w of a sum of squares."""
    arguments = (
        jax.ShapeDtypeStruct((rows, width), dtype),
        jax.ShapeDtypeStruct((groups, width, hidden), dtype),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )

    def loss(x, w, sizes):
        return jnp.sum(run(x, w, sizes, False).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 1))).trace(*arguments)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
def test_megablox_lowers_for_a_tpu(dtype):
    traced = gradients(megablox.grouped_matmul, 1000, 8, 256, 640, dtype)
    assert ("HIGHEST" in str(traced.jaxpr)) == (dtype == jnp.float32)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.parametrize("groups", [8, 64])
def test_what_it_costs(groups):
    """No array of w's size beside the gradient, and work that is counted: not E times the rows'."""
    rows, width, hidden = 512, 64, 128
    compiled = gradients(xla.grouped_matmul, rows, groups, width, hidden).lower().compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * rows * (2 * hidden + width) + 4 * 4 * width * hidden
    counts = hlo.count(compiled.as_text())
    assert counts.unknown == 0
    assert counts.flops < 3.1 * 3 * 2 * rows * width * hidden


def test_few_rows_go_one_by_one():
    """As a token's are while it is decoded: each by its own group's w."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(8, 5, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    sizes = jnp.asarray([0, 0, 1, 0, 0, 2, 0, 0], jnp.int32)  # the last row is of none
    assert xla.heights(4, 8) == [1] and xla.heights(5, 8)[-1] > 1
    for kernels, transpose in ((w, True), (w.swapaxes(1, 2), False)):
        y = grouped_matmul(x, kernels, sizes, transpose=transpose, implementation="xla")
        for row, group in enumerate((2, 5, 5)):
            expected = np.asarray(w[group], np.float64) @ np.asarray(x[row], np.float64)
            np.testing.assert_allclose(y[row], expected, rtol=1e-5)
        assert not y[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": (2, 4, 5)}, r"x \(6, 3\) has 3 features and w \(2, 4, 5\) takes 4"),
        ({"transpose": True}, r"x \(6, 3\) has 3 features and w \(2, 3, 5\) takes 5"),
        ({"sizes": (3,)}, r"3 sizes for the 2 groups of w \(2, 3, 5\)"),
        ({"x": (0, 3)}, r"x \(0, 3\) and w \(2, 3, 5\): at least one row and one group"),
        ({"w": (0, 3, 5), "sizes": (0,)}, r"w \(0, 3, 5\): at least one row and one group"),
        ({"x": (1, 6, 3)}, r"x \(1, 6, 3\), w \(2, 3, 5\) and sizes \(2,\) are not"),
    ],
)
def test_wrong_arguments_are_named(unchecked, change, message):
    shapes = {"x": (6, 3), "w": (2, 3, 5), "sizes": (2,)} | change
    transpose = shapes.pop("transpose", False)
    dtypes = {"sizes": jnp.int32}
    arrays = {k: jnp.zeros(s, dtypes.get(k, jnp.float32)) for k, s in shapes.items()}
    with pytest.raises(ValueError, match=message) as error:
        grouped_matmul(**arrays, transpose=transpose)
    assert "\n" not in str(error.value)
