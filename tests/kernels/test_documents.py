"""Packed documents: where they begin, and that no non-finite number leaves its own."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import linear_attention, selective_scan
from scanax.kernels.documents import isolate, segments, starts
from support.compare import close
from support.targets import tracing

TIME = 24
RESET = np.zeros((2, TIME), bool)
RESET[0, [9, 17]] = True  # row 0: the initial state's document, then two more
RESET[1, [0, 12]] = True  # row 1: its initial state is forgotten at once
DOCUMENT = np.array([[0] * 9 + [1] * 8 + [2] * 7, [1] * 12 + [2] * 12])
MIDDLE = (np.arange(2)[:, None] == 0) & (DOCUMENT == 1)
LAST = (np.arange(2)[:, None] == 0) & (DOCUMENT == 2)
FIRST = (np.arange(2)[:, None] == 0) & (DOCUMENT == 0)


def test_where_documents_begin():
    first = [0] * 9 + [9] * 8 + [17] * 7, [0] * 12 + [12] * 12
    np.testing.assert_array_equal(segments(jnp.asarray(RESET)), DOCUMENT)
    np.testing.assert_array_equal(starts(jnp.asarray(RESET)), first)


def draw(kind):
    op, _ = kind.split("-")
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    if op == "selective":
        tokens = {"u": normal(2, TIME, 3), "delta": np.abs(normal(2, TIME, 3))}
        tokens |= {"B": normal(2, TIME, 4), "C": normal(2, TIME, 4)}
        shared = {"A": -np.abs(normal(3, 4)), "D": normal(3)}
        return tokens, shared, normal(2, 3, 4)
    tokens = {n: normal(2, TIME, 2, w) for n, w in zip("qkv", (4, 4, 3), strict=True)}
    if op == "constant":
        return tokens, {"log_decay": -np.abs(normal(2))}, normal(2, 2, 4, 3)
    logs = -np.abs(normal(2, TIME, 2, *(4,) * (op == "vector")))
    return tokens | {"log_decay": logs}, {}, normal(2, 2, 4, 3)


OPS = tuple(
    f"{op}-{how}"
    for op in ("vector", "scalar", "constant", "selective")
    for how in ("reference", "associative", "xla", "pallas_tpu")
)
READERS = ("q", "C")  # a reader spoils its own token, the others all after it too
INPUTS = [(op, name) for op in OPS for name in draw(op)[0]]


@cache
def compiled(kind):
    """(tokens, shared, state, cotangents) -> ((y, state), their gradients), chunks of five."""
    op = selective_scan if "selective" in kind else linear_attention
    name = kind.split("-")[1]
    how = {"implementation": name, "reset": jnp.asarray(RESET)}
    how["chunk"] = 8 if name == "pallas_tpu" else 5

    def run(tokens, shared, state):
        return op(**tokens, **shared, state=state, **how)

    def call(tokens, shared, state, cotangents):
        out, pull = jax.vjp(run, tokens, shared, state)
        return out, pull(cotangents)

    compiled = jax.jit(call)

    def traced(*args):
        with tracing(name):
            return compiled(*args)

    return traced


def cotangents_of(kind):
    tokens, _, state = draw(kind)
    like = tokens["u" if "selective" in kind else "v"]
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=x.shape).astype(np.float32) for x in (like, state))


@cache
def clean(kind):
    return compiled(kind)(*draw(kind), cotangents_of(kind))


def finite(x):
    """(B, T): whether all features of a token are finite."""
    return np.isfinite(np.asarray(x)).all(axis=tuple(range(2, np.ndim(x))))


def outside(tree, where):
    return jax.tree.map(lambda x: np.asarray(x)[~where], tree)


def only(kind, result, document, values=None, gradients=None):
    """Values and gradients are the clean ones outside `document`; also of those two (B, T) sets."""
    (y, _), (tokens, _, _) = result
    (true_y, _), (true_tokens, _, _) = clean(kind)
    values = document if values is None else values
    gradients = document if gradients is None else gradients
    close(outside(y, values), outside(true_y, values), 1e-6)
    close(outside(tokens, gradients), outside(true_tokens, gradients), 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("kind", "name"), INPUTS)
def test_a_bad_input_stays_in_its_document(kind, name, value):
    tokens, shared, state = draw(kind)
    tokens[name][0, 11, ..., 1] = value
    result = compiled(kind)(tokens, shared, state, cotangents_of(kind))
    from_there_on = MIDDLE & (np.arange(TIME) >= 11)
    only(kind, result, MIDDLE, values=from_there_on)
    spoilt = ~finite(result[0][0])
    assert spoilt[0, 11] if name in READERS else (spoilt == from_there_on).all()
    close(result[0][1], clean(kind)[0][1], 1e-6)  # both rows end in other documents
    close(result[1][2], clean(kind)[1][2], 1e-6)  # and begin in others


@pytest.mark.parametrize("kind", OPS)
def test_a_bad_last_document_spoils_its_rows_state(kind):
    tokens, shared, state = draw(kind)
    name = "u" if "selective" in kind else "v"
    tokens[name][0, 20, ..., 1] = np.nan
    result = compiled(kind)(tokens, shared, state, cotangents_of(kind))
    only(kind, result, LAST)
    assert not np.isfinite(result[0][1][0]).all()
    close(result[0][1][1], clean(kind)[0][1][1], 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", OPS)
def test_a_bad_cotangent_stays_in_its_document(kind, value):
    dy, dstate = cotangents_of(kind)
    dy[0, 13, ..., 1] = dy[1, 3, ..., 1] = value
    result = compiled(kind)(*draw(kind), (dy, dstate))
    opening = (np.arange(2)[:, None] == 1) & (DOCUMENT == 1)  # it does not read its row's state
    only(kind, result, MIDDLE | opening, values=np.zeros_like(MIDDLE))
    wrote = result[1][0]["u" if "selective" in kind else "v"]
    assert not finite(wrote)[0, 9:14].any()  # all that the spoilt output reads
    close(result[1][2], clean(kind)[1][2], 1e-6)


@pytest.mark.parametrize("kind", OPS)
def test_a_bad_cotangent_of_the_state_stays_in_the_last_document(kind):
    dy, dstate = cotangents_of(kind)
    dstate[0, 0] = np.nan
    result = compiled(kind)(*draw(kind), (dy, dstate))
    only(kind, result, LAST, values=np.zeros_like(LAST))
    assert not finite(result[1][0]["u" if "selective" in kind else "v"])[0, 17:].any()
    close(result[1][2], clean(kind)[1][2], 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", OPS)
def test_a_bad_initial_state_stays_in_the_first_document(kind, value):
    """Row 1 begins with a reset: its initial state, whatever it holds, is not read."""
    tokens, shared, state = draw(kind)
    state[:, 0, 1] = value
    result = compiled(kind)(tokens, shared, state, cotangents_of(kind))
    only(kind, result, FIRST)
    assert not finite(result[0][0])[0, :9].any()
    np.testing.assert_array_equal(result[1][2][1], 0)


@pytest.mark.parametrize("kind", OPS)
def test_an_overflow_inside_stays_in_its_document(kind):
    """Finite inputs whose product is not, so that nothing at the edge of the operation sees it."""
    tokens, shared, state = draw(kind)
    for name in ("u", "B") if "selective" in kind else ("k", "v"):
        tokens[name][0, 11] = 1e30
    result = compiled(kind)(tokens, shared, state, cotangents_of(kind))
    only(kind, result, MIDDLE)
    assert not finite(result[0][0])[0, 11:17].any()


@pytest.mark.parametrize("place", [11, 16])
@pytest.mark.parametrize("kind", OPS)
def test_an_overflow_of_the_backward_stays_in_its_document(kind, place):
    """Of a cotangent that is finite, and so is all that the operation is given or gives.

    From token 16 it enters an earlier chunk of eight, which holds the end of another document.
    """
    tokens, shared, state = draw(kind)
    dy, dstate = cotangents_of(kind)
    tokens["C" if "selective" in kind else "q"][0, place] = 1e20
    dy[0, place] = 1e20
    result = compiled(kind)(tokens, shared, state, (dy, dstate))
    only(kind, result, MIDDLE)
    assert not finite(result[1][0]["u" if "selective" in kind else "v"])[0, 9:12].any()
    close(result[1][2], clean(kind)[1][2], 1e-6)


@pytest.mark.parametrize("kind", OPS)
def test_an_overflow_with_a_later_token_is_not_seen(kind):
    """A score above the diagonal may overflow; times a weight of zero it would be nan."""
    tokens, shared, state = draw(kind)
    reads, writes = ("C", "B") if "selective" in kind else ("q", "k")
    tokens[reads][0, 10] = tokens[writes][0, 11] = 1e20
    result = compiled(kind)(tokens, shared, state, cotangents_of(kind))
    assert finite(result[0][0])[0, :11].all()


def masked_sum(tokens, shared, state, reset):
    """Sums within documents by a matrix of zeros and ones, so that 0 * nan is a danger."""
    document = segments(reset)
    seen = (document[:, :, None] == document[:, None]) & jnp.tri(reset.shape[1], dtype=bool)
    y = jnp.einsum("bts,bsd->btd", seen.astype(tokens.dtype), shared * tokens)
    y += jnp.where(document[..., None] == 0, state[:, None], 0)
    return y, y[:, -1]


def test_isolate_keeps_what_the_operation_would_spread():
    rng = np.random.default_rng(0)
    tokens, state = (rng.normal(size=s).astype(np.float32) for s in ((2, TIME, 3), (2, 3)))
    shared, reset = np.full(3, 2.0, np.float32), jnp.asarray(RESET)

    def gradients(tokens):
        def loss(tokens, shared, state):
            y, last = isolate(masked_sum, tokens, shared, state, reset)
            return y.sum() + last.sum()

        return jax.grad(loss, (0, 1, 2))(tokens, shared, state)

    bad = tokens.copy()
    bad[0, 11] = np.nan
    y, last = isolate(masked_sum, bad, shared, state, reset)
    true_y, true_last = masked_sum(tokens, shared, state, reset)
    spread, _ = masked_sum(bad, shared, state, reset)
    assert not finite(spread)[0, :11].all()
    np.testing.assert_array_equal(np.isnan(y).any(axis=-1), MIDDLE & (np.arange(TIME) >= 11))
    keep = MIDDLE & (np.arange(TIME) >= 11)
    close((outside(y, keep), last), (outside(true_y, keep), true_last), 1e-6)
    (d_tokens, d_shared, d_state), true = gradients(bad), gradients(tokens)
    close((outside(d_tokens, MIDDLE), d_state), (outside(true[0], MIDDLE), true[2]), 1e-6)
    assert np.isnan(d_tokens[MIDDLE]).all()
    assert np.isnan(d_shared).all()  # every document contributes to it
