"""ViR's retention is y = out(norm((Q K^T * D) V)) whatever its chunk; attention may look ahead."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import Attention, AttentionConfig, Vir, VirConfig, decay
from scanax.models import LMConfig, SeriesConfig
from support.compare import close

WIDTH, HEADS, BATCH, TIME = 24, 3, 2, 21
NORMS = ("none", "head", "layer")


def arrays(model):
    """The model's parameters as float64, with biases and norms that are not those at the start."""
    rng = np.random.default_rng(0)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    return nnx.merge(graphdef, params, rest), jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params)
    )


def inputs():
    return np.random.default_rng(1).normal(size=(BATCH, TIME, WIDTH)).astype(np.float32)


def heads_of(p, x, name):
    y = x @ p[name]["kernel"] + p[name]["bias"]
    return y.reshape(*y.shape[:2], HEADS, -1)


def layer_norm(x, p):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1) * p["scale"] + p["bias"]


def meaning(p, x, config):
    """The whole matrix of decays, in float64."""
    q, k, v = (heads_of(p, x, name) for name in "qkv")
    gamma = {
        "paper": 1 - 2.0 ** (-5 - np.arange(HEADS)),
        "code": 1 - np.exp(np.linspace(math.log(1 / 32), math.log(1 / 512), HEADS)),
    }[config.decay]
    between = np.arange(TIME)[:, None] - np.arange(TIME)
    seen = np.where(between >= 0, gamma[:, None, None] ** np.maximum(between, 0), 0)
    scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(WIDTH // HEADS) * seen
    y = np.einsum("bhts,bshv->bthv", scores, v)
    if config.norm == "head":
        y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1) * p["norm"]["scale"]
    y = y.reshape(BATCH, TIME, WIDTH)
    if config.norm == "layer":
        y = layer_norm(y, p["norm"])
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return y @ p["out"]["kernel"] + p["out"]["bias"]


@pytest.mark.parametrize("norm", NORMS)
def test_parallel_chunkwise_and_recurrent_forms_are_one(norm):
    """One chunk of all tokens, several, and tokens one by one from a state: values and gradients.

    The norm's epsilon is 1: a small one would hide the scale of the queries.
    """
    config = VirConfig(HEADS, decay="code" if norm == "none" else "paper", norm=norm, norm_eps=1.0)
    model, p = arrays(Vir(WIDTH, config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    x, ct = inputs(), np.random.default_rng(2).normal(size=(BATCH, TIME, WIDTH))

    def parallel(chunk):
        def run(params, x):
            model = nnx.merge(graphdef, params)
            model.config = dataclasses.replace(config, chunk=chunk)
            return model(x)[0]

        return run

    def recurrent(params, x):
        model = nnx.merge(graphdef, params)

        def step(state, x):
            y, state = model(x[:, None], state)
            return state, y[:, 0]

        state = model.init_state(BATCH, TIME, jnp.float32)
        return jax.lax.scan(step, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    found = []
    for run in (parallel(TIME), parallel(4), recurrent):

        def loss(params, x, run=run):
            y = run(params, x)
            return jnp.sum(y * jnp.asarray(ct, y.dtype)), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
        close(y, meaning(p, x.astype(np.float64), config), 1e-5)
        found.append(nnx.to_pure_dict(grads[0]) | {"x": grads[1]})
    for grads in found[1:]:
        close(grads, found[0], 1e-4)


def test_decays():
    close(np.exp(decay.vir(5)[[0, 2, 4]]), np.array([1 - 1 / 32, 1 - 1 / 128, 1 - 1 / 512]), 1e-12)
    assert (np.diff(decay.vir(12)) > 0).all()


def test_what_does_not_fit_is_said_in_a_line(unchecked):
    with pytest.raises(ValueError, match=r"^width=24 does not divide into vir.heads=5$"):
        Vir(WIDTH, VirConfig(heads=5), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^vir.decay='slow' is not one of paper, code$"):
        VirConfig(decay="slow")
    with pytest.raises(ValueError, match=r"^vir.norm='rms' is not one of none, head, layer$"):
        VirConfig(norm="rms")


def test_attention_that_is_not_causal_sees_its_whole_document():
    config = AttentionConfig(heads=HEADS, causal=False, rope_base=None, bias=True, out_bias=True)
    model, p = arrays(Attention(WIDTH, config, rngs=nnx.Rngs(0)))
    x, cut = inputs(), 8
    reset = np.zeros((BATCH, TIME), bool)
    reset[0, cut] = True

    def whole(x):
        q, k, v = (heads_of(p, x, name) for name in "qkv")
        scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(WIDTH // HEADS)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y = np.einsum("bhts,bshv->bthv", weights, v).reshape(*x.shape)
        return y @ p["out"]["kernel"] + p["out"]["bias"]

    y, state = jax.jit(lambda x, reset: model(x, None, reset))(x, reset)
    x = x.astype(np.float64)
    first = np.concatenate([whole(x[:1, :cut]), whole(x[:1, cut:])], axis=1)
    close(y, np.concatenate([first, whole(x[1:])]), 1e-5)
    assert state is None
    with pytest.raises(ValueError, match="sees what comes later: it takes no state"):
        model(jnp.asarray(x, jnp.float32), model.init_state(BATCH, TIME, jnp.float32))


def test_attention_that_is_not_causal_is_refused_where_it_makes_no_sense(unchecked):
    with pytest.raises(ValueError, match="window=4 with causal=False; leave one of them out"):
        Attention(WIDTH, AttentionConfig(window=4, causal=False), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="shows a language model what it is to predict"):
        LMConfig(attention=AttentionConfig(causal=False))
    with pytest.raises(ValueError, match="shows a forecast what it is to predict"):
        SeriesConfig(attention=AttentionConfig(causal=False))
