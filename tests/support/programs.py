"""A language model's loss and all gradients as one compiled function."""

import functools

import jax
from flax import nnx
from scanax.models import LM, merge, split


@functools.cache
def program(config):
    """(parameters, loss with (nll, state) and gradients of (params, tokens, ...), the model).

    Traced once for all tests of a configuration, and for each mesh that it runs on.
    """
    graphdef, params, rest = split(LM(config, rngs=nnx.Rngs(0)))

    def loss(params, tokens, targets, reset, state):
        model = merge(graphdef, params, rest)
        nll, state, _ = model.nll(tokens, targets, state=state, reset=reset)
        return nll.mean(), (nll, state)

    return params, jax.jit(jax.value_and_grad(loss, has_aux=True)), merge(graphdef, params, rest)
