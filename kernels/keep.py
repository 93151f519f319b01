"""What is kept for the backward pass, and what is computed again.

Where a block is computed again, values of one name alone are kept: the results of products of
weights and of kernels, and what kernels make for their own backward pass. A policy that keeps
results by their primitives would look into the loops of kernels, and keep what each turn makes.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"
POLICY = jax.checkpoint_policies.save_only_these_names(NAME)


def keep(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, NAME)


def rule(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward rule of `jax.custom_vjp`; its results and residuals are kept, not its arguments."""

    @wraps(forward)
    def named(*arguments):
        known = {id(x): x for x in jax.tree.leaves(arguments)}

        def once(x):
            if id(x) not in known:
                known[id(x)] = keep(x)
            return known[id(x)]

        return jax.tree.map(once, forward(*arguments))

    return named


def again(f: Callable[..., Any]) -> Callable[..., Any]:
    """f of arrays, of which the backward pass keeps the arguments and computes the rest again.

    For activations, norms and other chains of cheap steps, each of whose results would be written
    and read, and copied into and out of a stack where layers are scanned. What f returns is written
    once, where XLA for CPUs would compute it in every place that reads it.
    """
    remembered = jax.checkpoint(f)

    @wraps(f)
    def written(*arguments):
        return jax.lax.optimization_barrier(remembered(*arguments))

    return written
