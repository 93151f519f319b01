"""Documents packed in one row: `reset` (bool, B T) marks a document's first token.

The fast paths multiply by masks that hold zeros, and 0 * nan is nan, so that one document's
overflow would reach its neighbours in the same chunk. `isolate` keeps each to its own: non-finite
tokens go in as zeros and come out as nan wherever they can reach inside their own document.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segments(reset: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of the document each token is in; 0 is the one that the initial state belongs to."""
    return jnp.cumsum(reset, axis=1, dtype=jnp.int32)


def starts(reset: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the first token of each token's document; 0 where it began before the row."""
    index = jnp.arange(reset.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(reset, index, 0), axis=1)


def positions(
    length: int, start: Int[Array, "B"] | None = None, reset: Bool[Array, "B T"] | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Each token's distance from the last reset at or before it, and the index that comes next.

    `start` is the position of the first token of a row that has not been reset yet (0 if None).
    With neither `start` nor `reset` one row (B = 1) stands for all.
    """
    time = jnp.arange(length, dtype=jnp.int32)
    index = time[None] if start is None else time + start[:, None].astype(jnp.int32)
    if reset is not None:
        latest = jax.lax.cummax(jnp.where(reset, time, -1), axis=1)
        index = jnp.where(latest >= 0, time - latest, index)
    return index, index[:, -1] + 1


def last_document(reset: Bool[Array, "B T"] | None, tokens: Any) -> tuple[Bool[Array, "B"], Any]:
    """Whether a document starts, and the tokens (B, T, ...), zero but for the last document's."""
    first = jax.tree.leaves(tokens)[0]
    if reset is None:
        return jnp.zeros(first.shape[0], bool), tokens
    document = segments(reset)
    others = document != document[:, -1:]
    return document[:, -1] > 0, _put(tokens, others, 0.0)


def _reached(bad: Array, reset: Array, *, reverse: bool = False) -> Array:
    """Which tokens have a bad one at or before (in `reverse`, after) them in their document."""
    if reverse:  # read backwards, a document begins at the token before the next reset
        last = jnp.concatenate([reset[:, 1:], jnp.ones_like(reset[:, :1])], axis=1)
        return _reached(bad[:, ::-1], last[:, ::-1])[:, ::-1]
    index = jnp.arange(1, bad.shape[1] + 1, dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(bad, index, 0), axis=1)
    return latest > starts(reset)


def _unsound(tree: Any, shape: tuple[int, ...]) -> Array:
    """Where any leaf, of leading axes `shape`, holds a non-finite number."""
    flag = jnp.zeros(shape, bool)
    for x in jax.tree.leaves(tree):  # 0 * x is nan or 0, and a state of zeros costs nothing
        flag |= jnp.isnan(jnp.sum(0 * x, axis=tuple(range(len(shape), x.ndim))))
    return flag


def _put(tree: Any, flag: Array, value: float) -> Any:
    def one(x):
        return jnp.where(flag.reshape(flag.shape + (1,) * (x.ndim - flag.ndim)), value, x).astype(
            x.dtype
        )

    return jax.tree.map(one, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def isolate(op: Callable, tokens: Any, shared: Any, state: Any, reset: Bool[Array, "B T"]):
    """`op(tokens, shared, state, reset) -> (outputs, state)`, non-finite values kept at home.

    tokens and outputs are pytrees of (B, T, ...), state one of (B, ...), shared of anything else.
    A non-finite token makes its document's outputs nan from there on, and a non-finite cotangent
    all gradients of its document (and of `shared`, to which every document contributes).
    """
    return _forward(op, tokens, shared, state, reset)[0]


def _forward(op, tokens, shared, state, reset):
    bad = _unsound(tokens, reset.shape)
    state_bad = _unsound(state, reset.shape[:1])
    tainted = _reached(bad.at[:, 0].max(state_bad & ~reset[:, 0]), reset)
    clean = _put(tokens, bad, 0.0), shared, _put(state, state_bad, 0.0)
    (outputs, final), pull = jax.vjp(lambda *args: op(*args, reset), *clean)
    result = _put(outputs, tainted, jnp.nan), _put(final, tainted[:, -1], jnp.nan)
    return result, (pull, tainted, reset)


def _backward(op, residuals, cotangents):
    pull, tainted, reset = residuals
    outputs, final = cotangents
    bad, final_bad = _unsound(outputs, reset.shape), _unsound(final, reset.shape[:1])
    bad = (bad | tainted).at[:, -1].max(final_bad)
    tokens, shared, state = pull((_put(outputs, bad, 0.0), _put(final, final_bad, 0.0)))
    document = _reached(bad, reset) | _reached(bad, reset, reverse=True)
    first = document[:, 0] & ~reset[:, 0]
    return (
        _put(tokens, document, jnp.nan),
        jax.tree.map(lambda g: jnp.where(bad.any(), jnp.nan, g).astype(g.dtype), shared),
        _put(state, first, jnp.nan),
        None,
    )


isolate.defvjp(_forward, _backward)
