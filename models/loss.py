"""Next-token loss without all logits at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def nll(
    head: Callable[[Float[Array, "B t D"]], Float[Array, "B t vocab"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """-log softmax(head(hidden))[target] in nats, for `chunk` tokens at a time (0: all at once).

    A chunk is a span of time over all rows, at least one time step, so that a batch sharded over
    devices stays so. Each chunk's logits are computed again in the backward pass and their
    gradient to the head's weights is added up chunk by chunk.
    """
    batch, time = targets.shape
    span = min(time, max(1, chunk // batch)) if chunk else time
    if span == time:
        return _nll(head, hidden, targets)
    spans = -(-time // span)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, spans * span - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, spans, span, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(_, x):
        return None, _nll(head, *x)

    _, losses = jax.lax.scan(body, None, (split(hidden), split(targets)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, spans * span)[:, :time]


def _nll(head, hidden, targets):
    logits = head(hidden)
    # An id outside the vocabulary reads nan, which the trainer counts, rather than another token.
    index = jnp.where(targets < 0, logits.shape[-1], targets)
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
