"""Any monoid over a sequence: p_t = e_0 o e_1 o ... o e_t, for a mixer that has no kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from . import checks
from .monoid import Element, Monoid, associative, resettable

CHUNK = 64  # tokens that are combined at once, in twice log2 of so many steps


def prefixes(
    monoid: Monoid,
    elements: Element,
    *,
    state: Element | None = None,
    reset: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
) -> tuple[Element, Element]:
    """p_t = state o e_0 o ... o e_t for every token, and the last of them, which is the next state.

    `elements` is a pytree of arrays (B, T, ...): what one token is in the monoid. The outputs of a
    mixer are read from the prefixes, token by token. `state` (B, ...) is the element of all tokens
    before (none if None); `reset` marks tokens before which it is forgotten. All T prefixes exist
    at once: for elements of a few numbers a channel, not for a matrix a head, for which
    `linear_attention` keeps one in `chunk` tokens.

    Returns (prefixes, state), floats in at least float32. Raises ValueError for shapes that do not
    fit.
    """
    check(elements, state, reset, chunk)
    elements = wide(elements)
    batch, time = jax.tree.leaves(elements)[0].shape[:2]
    if state is None:
        state = monoid.identity(jax.tree.map(lambda x: x[:, 0], elements))
    rule, carry = monoid, as_wide(state, elements)
    x = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), elements)
    if reset is not None:
        rule = resettable(monoid)
        carry, x = (jnp.zeros(batch, bool), carry), (reset.T, x)
    size = min(chunk or CHUNK, time)
    whole = time // size * size

    @jax.checkpoint
    def step(carry, part):
        inside = associative(rule, part, carry)
        return jax.tree.map(lambda x: x[-1], inside), inside

    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), x)
    carry, y = jax.lax.scan(step, carry, parts)
    y = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), y)
    if whole < time:
        carry, rest = step(carry, jax.tree.map(lambda x: x[whole:], x))
        y = jax.tree.map(lambda *two: jnp.concatenate(two), y, rest)
    if reset is not None:
        carry, y = carry[1], y[1]
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), y), carry


def wide(tree: Element) -> Element:
    """Floats in at least float32."""

    def one(x):
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.promote_types(jnp.float32, x.dtype)) if floats else x

    return jax.tree.map(one, tree)


def as_wide(state: Element, elements: Element) -> Element:
    """A state in the dtypes of elements that are wide."""
    return jax.tree.map(lambda s, x: s.astype(x.dtype), state, elements)


def check(elements: Any, state: Any, reset: Any, chunk: Any) -> None:
    """Raise a ValueError that names the first shape that does not fit."""
    shapes = [x.shape for x in jax.tree.leaves(elements)]
    if not shapes or any(len(shape) < 2 or shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(f"elements have shapes {shapes}; all must begin with one (batch, time)")
    batch, time = shapes[0][:2]
    if not time:
        raise ValueError(f"elements of shapes {shapes} hold no token; at least one is needed")
    wanted = jax.tree.map(lambda x: (batch, *x.shape[2:]), elements)
    found = jax.tree.map(lambda x: x.shape, state)
    if state is not None and found != wanted:
        raise ValueError(f"state has shapes {found}, not {wanted}: elements without their time")
    checks.mask("reset", reset, (batch, time))
    checks.size("chunk", chunk)
