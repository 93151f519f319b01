"""`kernels.diagonal_scan` on the mesh in force: rows, time and channels over its axes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from .. import kernels
from ..kernels.diagonal_scan import Constant, PerToken, State, Tokens, summary
from ..kernels.diagonal_scan import reference as definition
from . import mesh
from .sequence import lying, run


def diagonal_scan(
    u: Tokens,
    log_decay: Constant | PerToken,
    *,
    state: State | None = None,
    reset: Bool[Array, "B T"] | None = None,
    **how: Any,
) -> tuple[Tokens, State]:
    """`kernels.diagonal_scan` on the mesh in force.

    The channels lie over the axis tensor if they divide, else whole on every device of it. Raises
    what that raises, and ValueError for rows or a time that do not divide over their axes.
    """
    if not mesh.several():
        return kernels.diagonal_scan(u, log_decay, state=state, reset=reset, **how)
    batch, time, *payload, channels = u[0].shape
    mesh.check(batch, time)
    exact = jnp.promote_types(jnp.float32, u[0].dtype)
    if state is None:
        zeros = jnp.zeros((batch, *payload, channels), exact)
        state = zeros, zeros
    constant = log_decay[0].ndim == 1
    axis = "tensor" if channels % mesh.size("tensor") == 0 else None
    places = P(*lying(time)[0], *(None for _ in payload), axis)
    by_token = P(*lying(time)[0], axis)
    tokens, shared = (u, log_decay) if constant else ((u, log_decay), ())
    cuts: Any = (places, P(axis)) if constant else ((places, by_token), ())
    states = P(mesh.ROWS, *(None for _ in payload), axis)

    def pair(tokens, shared):
        return (tokens, shared) if constant else tokens

    def op(tokens, shared, state, reset):
        u, log_decay = pair(tokens, shared)
        return kernels.diagonal_scan(u, log_decay, state=state, reset=reset, **how)

    def summarize(tokens, shared, reset, state):
        return summary.summarize(*pair(tokens, shared), reset, state)

    def element(state):
        log = jnp.zeros((state[0].shape[0], state[0].shape[-1]), exact)
        return (log, log), state

    return run(
        op,
        tokens,
        shared,
        jax.tree.map(lambda x: x.astype(exact), state),
        reset,
        specs=(cuts[0], cuts[1], states, places),
        summarize=summarize,
        monoid=lambda _: definition.DECAY,
        element=element,
        value=lambda element: element[1],
    )
