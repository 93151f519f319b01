"""The chunked loss: exactly the dense one, in the memory of a chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.models import LM, LMConfig, merge, split
from scanax.sharding.vocabulary import nll
from support.compare import close

B, T, D, VOCAB = 2, 29, 8, 40


def _dense(weight, hidden, targets):
    logits = jnp.einsum("btd,dv->btv", hidden, weight, precision="highest")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], 2)[..., 0]


def _chunked(chunk, weight, hidden, targets):
    head = lambda x, weight: jnp.einsum("btd,dv->btv", x, weight, precision="highest")  # noqa: E731
    return nll(head, weight, hidden, targets, VOCAB, chunk)


@pytest.mark.parametrize("chunk", [0, 1, 7, 16, 58, 1000])
def test_chunked_is_dense(chunk):
    """Values and gradients, for chunks that divide nothing, one step and more than there is."""
    rng = np.random.default_rng(chunk)
    weight = jnp.asarray(rng.normal(size=(D, VOCAB)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=(B, T)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(loss, weight, hidden):
        value, pull = jax.vjp(lambda w, h: loss(w, h, targets), weight, hidden)
        return value, pull(cotangent)

    chunked = both(functools.partial(_chunked, chunk), weight, hidden)
    close(chunked, both(_dense, weight, hidden), 1e-6)


def test_a_target_outside_the_vocabulary_is_nan_and_alone():
    hidden, weight = jnp.ones((B, T, D), jnp.float32), jnp.ones((D, VOCAB), jnp.float32)
    targets = jnp.zeros((B, T), jnp.int32).at[1, 20].set(VOCAB)
    value = np.asarray(_chunked(6, weight, hidden, targets))
    assert np.isnan(value[1, 20]) and np.isnan(value).sum() == 1


@pytest.mark.parametrize("tie_head", [True, False])
def test_memory_is_a_chunk_of_logits(tie_head):
    """Forward and backward of a model with a large vocabulary, as the compiler accounts for it."""
    vocab, chunk, time = 16384, 16, 256

    def temporaries(chunk):
        config = LMConfig(
            vocab=vocab, width=8, depth=1, pattern="aaren", tie_head=tie_head, loss_chunk=chunk
        )
        model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
        graphdef, params, rest = split(model)

        def loss(params, rest, tokens, targets):
            return merge(graphdef, params, rest).nll(tokens, targets)[0].mean()

        ids = jax.ShapeDtypeStruct((2, time), jnp.int32)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, rest, ids, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * time * vocab * 4  # of all tokens, in bytes
    assert temporaries(0) > logits
    # a few copies of one chunk (logits, softmax, gradient) and of the head's gradient
    assert temporaries(chunk) < logits / 4
