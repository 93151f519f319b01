"""A language model's two ends with the vocabulary over `tensor`: lookup and loss (Megatron-LM).

No device ever has the logits of another's tokens of the vocabulary: the loss needs three numbers a
token from each, its largest logit, its sum of exponentials and the target's logit
(arXiv:1909.08053).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from . import mesh
from .sequence import manual

WORDS = P("tensor")  # tables (V, D)


def take(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """table[ids]; an id outside the table reads nan, which is seen, rather than another row."""
    known = (ids >= 0) & (ids < table.shape[0])
    if not mesh.several():
        return jnp.take(table, jnp.where(known, ids, table.shape[0]), axis=0, mode="fill")
    mesh.check(*ids.shape, table.shape[0], "vocabulary", mesh.ENDS)
    whole = mesh.size("tensor") == 1

    def local(table, ids):
        mine = ids - jax.lax.axis_index("tensor") * table.shape[0]
        here = (mine >= 0) & (mine < table.shape[0])
        rows = jnp.where(here[..., None], jnp.take(table, jnp.where(here, mine, 0), axis=0), 0)
        return rows if whole else jax.lax.psum(rows, "tensor")

    place = tokens(ids)
    rows = manual(local, (WORDS, place), place)(table, ids)
    return jnp.where(known[..., None], rows, jnp.nan)


def nll(
    project: Callable,
    weight: Float[Array, "D V"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    vocab: int,
    chunk: int,
) -> Float[Array, "B T"]:
    """-log softmax(project(hidden, weight))[target] in nats, over the first `vocab` columns.

    `chunk` tokens at a time (0: all at once) of each device: spans of time over its rows, one time
    step at least. Each chunk's logits are computed again in the backward pass and their gradient
    to the weight is added up chunk by chunk. A target outside the vocabulary is nan.
    """
    if not mesh.several():
        return _spans(project, weight, hidden, targets, vocab, chunk, None)
    mesh.divide("vocabulary", weight.shape[1], "tensor")

    def local(weight, hidden, targets):
        axis = "tensor" if mesh.size("tensor") > 1 else None
        return _spans(project, weight, hidden, targets, vocab, chunk, axis)

    place = tokens(targets)
    return manual(local, (P(None, "tensor"), place, place), place)(weight, hidden, targets)


def tokens(ids: Int[Array, "B T"]) -> P:
    """Where arrays (B, T, ...) lie outside of the blocks."""
    return P(mesh.ENDS, mesh.over_time(ids.shape[1]))


def _spans(project, weight, hidden, targets, vocab, chunk, axis):
    batch, time = targets.shape
    span = min(time, max(1, chunk // batch)) if chunk else time
    if span == time:
        return _nll(project, weight, hidden, targets, vocab, axis)
    spans = -(-time // span)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, spans * span - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, spans, span, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(_, x):
        return None, _nll(project, weight, *x, vocab, axis)

    _, losses = jax.lax.scan(body, None, (split(hidden), split(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, spans * span)[:, :time]


def _nll(project, weight, hidden, targets, vocab, axis):
    logits, first = project(hidden, weight), 0
    if axis is None:
        logits = logits[..., :vocab]
    else:  # columns past the vocabulary are on the last devices
        first = jax.lax.axis_index(axis) * weight.shape[1]
        there = first + jnp.arange(weight.shape[1], dtype=jnp.int32) < vocab
        logits = jnp.where(there, logits, -jnp.inf)
    mine, known = targets - first, (targets >= 0) & (targets < vocab)
    here = known & (mine >= 0) & (mine < logits.shape[-1])
    index = jnp.where(here, mine, 0)[..., None]
    chosen = jnp.where(here, jnp.take_along_axis(logits, index, axis=-1)[..., 0], 0)
    if axis is None:
        total = jax.nn.logsumexp(logits, axis=-1)
    else:
        top = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), axis)
        total = top + jnp.log(jax.lax.psum(jnp.exp(logits - top[..., None]).sum(axis=-1), axis))
        chosen = jax.lax.psum(chosen, axis)
    return jnp.where(known, total - chosen, jnp.nan)
