"""Laws of the language model, on one model that holds every mixer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.aaren import AarenConfig
from scanax.layers.attention import AttentionConfig
from scanax.layers.mamba2 import Mamba2Config
from scanax.layers.mlp import MLPConfig
from scanax.models import LM, LMConfig, by_layer, decayed, merge, split
from support.compare import close

B, T, CUT = 2, 19, 9
MIXED = LMConfig(
    vocab=50,
    width=16,
    depth=8,
    pattern="gla+swiglu*2,retention+gelu,lightning+glu,mamba,mamba2,aaren,attention+geglu",
    mamba2=Mamba2Config(head_width=8, state=4),
    attention=AttentionConfig(heads=2, kv_heads=1),
)
PAIR = dataclasses.replace(MIXED, depth=3, pattern="gla+swiglu*2,attention")


@functools.cache
def parts(config):
    return split(LM(config, rngs=nnx.Rngs(0)))


@functools.cache
def forward(config):
    graphdef, _, rest = parts(config)

    @jax.jit
    def call(params, tokens, state, reset):
        return merge(graphdef, params, rest)(tokens, state, reset)

    return call


@functools.cache
def loss(config):
    """Mean loss in nats and its gradient."""
    graphdef, _, rest = parts(config)

    def mean(params, tokens):
        targets = jnp.roll(tokens, -1, axis=1)
        nll, _, aux = merge(graphdef, params, rest).nll(tokens, targets)
        assert aux == {} and nll.shape == tokens.shape
        return nll.mean()

    return jax.jit(jax.value_and_grad(mean))


def tokens(seed=0, rows=B, time=T):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 50, (rows, time)), jnp.int32)


def test_logits_are_float32_of_the_vocabulary():
    params, ids = parts(MIXED)[1], tokens()
    logits, state = forward(MIXED)(params, ids, None, None)
    assert logits.shape == (B, T, 50) and logits.dtype == jnp.float32
    assert len(state) == 8 and state[7] is None  # attention that trains keeps no cache
    assert np.isfinite(logits).all()


def test_streaming_is_the_full_sequence():
    """Prefill in two chunks and then a token: same logits, and a state that a loop can carry."""
    params, ids, step = parts(MIXED)[1], tokens(), forward(MIXED)
    full, final = step(params, ids, None, None)
    state = merge(*parts(MIXED)).init_state(B, T)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(x.shape[0] == B for x in jax.tree.leaves(state))
    pieces = []
    for start, stop in ((0, CUT), (CUT, 2 * CUT), (2 * CUT, T)):
        logits, state = step(params, ids[:, start:stop], state, None)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
        pieces.append(logits)
    close(jnp.concatenate(pieces, axis=1), full, 1e-5)
    for streamed, whole in zip(state[:7], final[:7], strict=True):
        close(streamed, whole, 1e-5)


def test_packed_documents_are_separate_ones():
    params, ids, step = parts(MIXED)[1], tokens(), forward(MIXED)
    reset = np.zeros((B, T), bool)
    reset[0, CUT], reset[1, 0], reset[1, T - 4] = True, True, True
    packed, _ = step(params, ids, None, jnp.asarray(reset))
    for row, first, last in ((0, 0, CUT), (0, CUT, T), (1, 0, T - 4), (1, T - 4, T)):
        # causal: what follows a document does not change it, so that one length serves all
        alone = jnp.roll(ids[row : row + 1], -first, axis=1)
        logits, _ = step(params, jnp.tile(alone, (B, 1)), None, jnp.zeros((B, T), bool))
        close(packed[row, first:last], logits[0, : last - first], 1e-5)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 1}], ids=str)
def test_how_blocks_are_compiled_changes_neither_loss_nor_gradient(change):
    params, ids = parts(PAIR)[1], tokens()
    value, grads = loss(PAIR)(params, ids)
    otherwise, other_grads = loss(dataclasses.replace(PAIR, **change))(params, ids)
    close(otherwise, value, 1e-6)
    close(other_grads, grads, 1e-5)


@pytest.mark.parametrize("config, residual_float32", [(MIXED, True), (PAIR, False)])
def test_bfloat16_loss_is_close(config, residual_float32):
    params, ids = parts(config)[1], tokens()
    half = dataclasses.replace(config, dtype="bfloat16", residual_float32=residual_float32)
    # larger than at the start, so that the loss is not log(vocab) whatever the blocks do
    mask = decayed(params)
    params = jax.tree.map(lambda p, kernel: 1.5 * p if kernel else p, params, mask)
    params["embedding"] *= 7
    value = _value(config, params, ids)
    assert abs(value / np.log(50) - 1) > 0.05
    assert abs(_value(half, params, ids) / value - 1) < 0.005


def _value(config, params, ids):
    logits, _ = forward(config)(params, ids, None, None)
    assert logits.dtype == jnp.float32
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(ids, -1, 1)[..., None], 2)
    return float(-chosen.mean())


def test_float64_runs_end_to_end():
    _, params, _ = parts(PAIR)
    expected, _ = loss(PAIR)(params, tokens())
    with jax.enable_x64(True):
        double = dataclasses.replace(PAIR, dtype="float64", param_dtype="float64")
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        logits, state = forward(double)(params, tokens(), None, None)
        value, grads = loss(double)(params, tokens())
        wide = jax.tree.leaves((logits, value, grads, state))
        assert {x.dtype for x in wide} == {jnp.dtype(jnp.float64)}
        close(value, expected, 1e-6)


def test_head_and_embedding_options():
    config = dataclasses.replace(
        PAIR, vocab=50, vocab_multiple=16, tie_head=False, embed_scale=True, norm="layer"
    )
    _, params, _ = parts(config)
    assert params["embedding"].shape == (64, 16) and params["head"]["kernel"].shape == (16, 64)
    step, ids = forward(config), tokens()
    logits, _ = step(params, ids, None, None)
    assert logits.shape == (B, T, 50)
    # embed_scale is sqrt(16) = 4: the same as a table four times as large without it
    plain = dataclasses.replace(config, embed_scale=False)
    scaled = {**params, "embedding": 4 * params["embedding"]}
    close(forward(plain)(scaled, ids, None, None)[0], logits, 1e-5)
    for wrong in (64, 50, -1):
        beyond, _ = step(params, ids.at[0, 3].set(wrong), None, None)
        assert np.isnan(beyond[0, 3]).all() and np.isfinite(beyond[1]).all()


@pytest.mark.parametrize(("pattern", "branches"), [("mamba", 3), ("mamba+gelu,aaren", 5)])
def test_last_projections_start_divided_by_the_root_of_the_residual_branches(pattern, branches):
    config = LMConfig(width=64, depth=3, pattern=pattern, mlp=MLPConfig(scale_residual=True))
    flat = by_layer(config, parts(config)[1])
    largest = jnp.abs(flat["layers.0.mixer.out.kernel"]).max()  # of 128 * 64 uniform draws
    assert float(largest) == pytest.approx((128 * branches) ** -0.5, rel=0.01)
    for name in ("layers.0.mlp.down.kernel", "layers.1.mixer.out.kernel"):
        if "aaren" in pattern:
            assert float(flat[name].std()) == pytest.approx(0.02 * branches**-0.5, rel=0.05)


def test_aaren_hears_its_initial_spread():
    config = LMConfig(width=64, depth=1, pattern="aaren", aaren=AarenConfig(init_std=0.3))
    spread = by_layer(config, parts(config)[1])["layers.0.mixer.k.kernel"].std()
    assert float(spread) == pytest.approx(0.3, rel=0.05)


def test_a_state_without_a_cache_is_refused():
    model = merge(*parts(PAIR))
    _, state = model(tokens())
    with pytest.raises(ValueError, match="attention keeps no cache; begin with init_state"):
        model(tokens(), state)


def test_a_state_of_another_depth_is_refused():
    model = merge(*parts(PAIR))
    with pytest.raises(ValueError, match="state has 2 entries; the model has 3 blocks"):
        model(tokens(), model.init_state(B, T)[:2])


def test_a_token_copies_no_cache():
    """Temporaries are less than half of eight layers' caches; each is updated where it lies."""
    config = LMConfig(vocab=16, width=16, depth=8, pattern="attention+swiglu")
    model = LM(config, rngs=nnx.Rngs(0))
    graphdef, params, rest = split(model)
    state = jax.eval_shape(lambda: model.init_state(1, 16384))

    def step(params, tokens, state):
        return merge(graphdef, params, rest)(tokens, state)

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = jax.jit(step, donate_argnums=2).lower(params, tokens, state).compile()
    memory, size = (
        program.memory_analysis(),
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    )
    assert memory.alias_size_in_bytes > 0.99 * size
    assert memory.temp_size_in_bytes < size / 2
