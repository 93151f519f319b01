"""The kernels on whatever mesh is in force: the same calls, rows, time and heads over its axes.

Without a mesh of several devices each is the kernel itself. All of a call's work is done where
its tokens are; see `sequence` for what travels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from .. import kernels
from ..kernels import documents
from ..kernels.attention import fixed_query_summary
from ..kernels.linear_attention import summary as linear_summary
from ..kernels.monoid import COUNT, DECAY, LOWEST, SOFTMAX, Element, Monoid, fold, resettable
from ..kernels.prefixes import as_wide, check, wide
from ..kernels.selective_scan import summary as selective_summary
from . import mesh
from .attention import attention as attention
from .diagonal import diagonal_scan as diagonal_scan
from .sequence import grouped, lying, run

BY_HEAD = P(mesh.ROWS, "tensor")  # states (B, H, ...)


def linear_attention(
    q: Float[Array, "B T Gq K"],
    k: Float[Array, "B T Gk K"],
    v: Float[Array, "B T Gv V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | Float[Array, "B T H K"],
    *,
    state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    **how: Any,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`kernels.linear_attention` on the mesh in force: rows, time and heads over its axes.

    Raises what that raises, and ValueError for a size that does not divide over its axis.
    """
    if not mesh.several():
        return kernels.linear_attention(q, k, v, log_decay, state=state, reset=reset, **how)
    heads = max(q.shape[2], k.shape[2], v.shape[2], log_decay.shape[2 * (log_decay.ndim > 1)])
    mesh.check(q.shape[0], q.shape[1], heads)
    exact = jnp.promote_types(jnp.float32, jnp.result_type(q, k, v))
    if state is None:
        state = jnp.zeros((q.shape[0], heads, q.shape[3], v.shape[3]), exact)
    (q, k, v), grouping = zip(*(grouped(x, heads) for x in (q, k, v)), strict=True)
    constant = log_decay.ndim == 1
    tokens, shared = ((q, k, v), log_decay) if constant else ((q, k, v, log_decay), ())
    by_head = lying(q.shape[1])[1]
    places: Any = (grouping, P("tensor")) if constant else ((*grouping, by_head), ())

    def op(tokens, shared, state, reset):
        *qkv, log_decay = (*tokens, shared) if constant else tokens
        return kernels.linear_attention(*qkv, log_decay, state=state, reset=reset, **how)

    def summarize(tokens, shared, reset, state):
        _, k, v, log_decay = (*tokens, shared) if constant else tokens
        return linear_summary.summarize(k, v, log_decay, reset, state)

    def element(state):
        vector = not constant and log_decay.ndim == 4
        return jnp.zeros(state.shape[: 3 if vector else 2], state.dtype), state

    return run(
        op,
        tokens,
        shared,
        state.astype(exact),
        reset,
        specs=(places[0], places[1], BY_HEAD, by_head),
        summarize=summarize,
        monoid=lambda _: DECAY,
        element=element,
        value=lambda element: element[1],
    )


def selective_scan(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    D: Float[Array, "D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    **how: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """`kernels.selective_scan` on the mesh in force, its channels D over the axis tensor.

    Raises what that raises, and ValueError for a size that does not divide over its axis.
    """
    if not mesh.several():
        return kernels.selective_scan(u, delta, A, B, C, D=D, state=state, reset=reset, **how)
    mesh.check(u.shape[0], u.shape[1], u.shape[2], "channels")
    exact = jnp.promote_types(jnp.float32, u.dtype)
    state = jnp.zeros((u.shape[0], *A.shape), exact) if state is None else state.astype(exact)
    D = jnp.zeros(u.shape[2], exact) if D is None else D
    whole, by_channel = lying(u.shape[1])
    tokens = by_channel, by_channel, whole, whole

    def op(tokens, shared, state, reset):
        (u, delta, B, C), (A, D) = tokens, shared
        return kernels.selective_scan(u, delta, A, B, C, D=D, state=state, reset=reset, **how)

    def summarize(tokens, shared, reset, state):
        (u, delta, B, _), (A, _) = tokens, shared
        return selective_summary.summarize(u, delta, A.astype(exact), B, reset, state)

    return run(
        op,
        (u, delta, B, C),
        (A, D),
        state,
        reset,
        specs=(tokens, (P("tensor"), P("tensor")), BY_HEAD, by_channel),
        summarize=summarize,
        monoid=lambda shared: selective_summary.monoid(shared[0].astype(exact)),
        element=lambda h: (jnp.zeros(h.shape[:2], h.dtype), h),
        value=lambda element: element[1],
    )


def fixed_query(
    q: Float[Array, "H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float | None = None,
    state: Any = None,
    reset: Bool[Array, "B T"] | None = None,
    **how: Any,
) -> tuple[Float[Array, "B T H V"], Any]:
    """`kernels.fixed_query` on the mesh in force: rows, time and heads over its axes.

    Raises what that raises, and ValueError for a size that does not divide over its axis.
    """
    if not mesh.several():
        return kernels.fixed_query(q, k, v, scale=scale, state=state, reset=reset, **how)
    heads = q.shape[0]
    mesh.check(k.shape[0], k.shape[1], heads)
    exact = jnp.promote_types(jnp.float32, jnp.result_type(q, k, v))
    if state is None:
        u = jnp.zeros((k.shape[0], heads), exact)
        state = jnp.full_like(u, LOWEST), u, jnp.zeros((*u.shape, v.shape[3]), exact)
    scale = q.shape[1] ** -0.5 if scale is None else scale
    (k, v), specs = zip(*(grouped(x, heads) for x in (k, v)), strict=True)

    def op(tokens, q, state, reset):
        return kernels.fixed_query(q, *tokens, scale=scale, state=state, reset=reset, **how)

    def summarize(tokens, q, reset, state):
        return fixed_query_summary.summarize(q, *tokens, scale, reset, state)

    return run(
        op,
        (k, v),
        q,
        jax.tree.map(lambda x: x.astype(exact), state),
        reset,
        specs=(specs, P("tensor"), BY_HEAD, lying(k.shape[1])[1]),
        summarize=summarize,
        monoid=lambda _: SOFTMAX,
        element=lambda state: state,
        value=lambda element: element,
    )


def prefixes(
    monoid: Monoid,
    elements: Element,
    *,
    state: Element | None = None,
    reset: Bool[Array, "B T"] | None = None,
    **how: Any,
) -> tuple[Element, Element]:
    """`kernels.prefixes` on the mesh in force, for elements (B, T, H, ...), H over the axis tensor.

    The heads or channels H do not meet in `combine`. Raises ValueError for a size that does not
    divide over its axis.
    """
    if not mesh.several():
        return kernels.prefixes(monoid, elements, state=state, reset=reset, **how)
    check(elements, state, reset, how.get("chunk"))
    shapes = [x.shape for x in jax.tree.leaves(elements)]
    if {shape[2:3] for shape in shapes} != {shapes[0][2:3]} or len(shapes[0]) < 3:
        raise ValueError(f"elements have shapes {shapes}; on a mesh all must begin (B, T, H)")
    batch, time, heads = shapes[0][:3]
    mesh.check(batch, time, heads, "channels")
    elements = wide(elements)
    if state is None:
        state = monoid.identity(jax.tree.map(lambda x: x[:, 0], elements))
    by_head = lying(time)[1]

    def op(tokens, shared, state, reset):
        return kernels.prefixes(monoid, tokens, state=state, reset=reset, **how)

    def summarize(tokens, shared, reset, state):
        flags = jnp.zeros(jax.tree.leaves(tokens)[0].shape[:2], bool) if reset is None else reset
        time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (flags, tokens))
        return fold(resettable(monoid), time_first)

    return run(
        op,
        elements,
        (),
        as_wide(state, elements),
        reset,
        specs=(by_head, (), BY_HEAD, by_head),
        summarize=summarize,
        monoid=lambda _: monoid,
        element=lambda state: state,
        value=lambda element: element,
    )


def positions(
    length: int, start: Int[Array, "B"] | None = None, reset: Bool[Array, "B T"] | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """(each token's distance from its document's first one, that of the token after the last).

    `start` is the distance of the first token here, 0 if None; positions are counted in tokens.
    Raises ValueError for rows or a time that do not divide over the mesh in force.
    """
    if reset is None or not mesh.several():  # without documents they are an iota, wherever it lies
        return documents.positions(length, start, reset)
    mesh.check(reset.shape[0], reset.shape[1])
    marks, _ = lying(reset.shape[1])
    start = jnp.zeros(reset.shape[0], jnp.int32) if start is None else start.astype(jnp.int32)

    def summarize(reset, shared, _, state):
        _, count = documents.positions(reset.shape[1], None, reset)
        return reset.any(axis=1), count

    return run(
        lambda reset, _, start, __: documents.positions(reset.shape[1], start, reset),
        reset,
        (),
        start,
        None,
        specs=(marks, (), P(mesh.ROWS), marks),
        summarize=summarize,
        monoid=lambda _: COUNT,
        element=lambda count: count,
        value=lambda count: count,
    )
