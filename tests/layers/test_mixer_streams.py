"""Any cut of a stream gives the same numbers, and documents do not see each other: every mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.aaren import Aaren, AarenConfig
from scanax.layers.attention import Attention, AttentionConfig
from scanax.layers.depth import Depth
from scanax.layers.gated_conv import GatedConv, GatedConvConfig
from scanax.layers.gla import GLA, GLAConfig
from scanax.layers.lightning import Lightning, LightningConfig
from scanax.layers.mamba import Mamba, MambaConfig
from scanax.layers.mamba2 import Mamba2, Mamba2Config
from scanax.layers.retention import Retention, RetentionConfig
from scanax.layers.vir import Vir, VirConfig
from support.compare import close

WIDTH, BATCH, TIME, CAPACITY = 16, 4, 16, 16
MIXERS = {
    "gla": (GLA, GLAConfig(heads=2, conv=3)),
    "retention": (Retention, RetentionConfig(heads=2, conv=3)),
    "vir": (Vir, VirConfig(heads=2)),
    "lightning": (Lightning, LightningConfig(heads=2, lrpe_layers=2)),
    "mamba": (Mamba, MambaConfig(state=4)),
    "jamba": (Mamba, MambaConfig(state=4, dt_rank=3, norm="weighted", bias=True)),
    "time-invariant": (Mamba, MambaConfig(state=4, selective=False)),
    "mamba2": (Mamba2, Mamba2Config(head_width=8, groups=2, state=4)),
    "aaren": (Aaren, AarenConfig(heads=2)),
    "attention": (Attention, AttentionConfig(heads=4, kv_heads=2, bias=True)),
    "conv": (GatedConv, GatedConvConfig(init_std=0.3)),
    "windowed": (Attention, AttentionConfig(heads=2, window=4, head_width=6, rope_base=None)),
}


class Case:
    """A mixer, its input, and its jitted call; compiled once for each length."""

    def __init__(self, mixer, config, dtype=jnp.float32):
        self.model = mixer(WIDTH, config, depth=Depth(1, 2), dtype=dtype, rngs=nnx.Rngs(0))
        graph, params = nnx.split(self.model)
        call = jax.jit(lambda p, x, state, reset: nnx.merge(graph, p)(x, state, reset))
        self.run = lambda x, state, reset: call(params, x, state, reset)
        self.x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH), dtype)
        self.none = jnp.zeros((BATCH, TIME), bool)

    def pieces(self, sizes, x, reset):
        """Outputs and final state of the stream cut into `sizes`."""
        state, outputs, at = self.model.init_state(BATCH, CAPACITY, x.dtype), [], 0
        for size in sizes:
            y, state = self.run(x[:, at : at + size], state, reset[:, at : at + size])
            outputs.append(y)
            at += size
        return jnp.concatenate(outputs, axis=1), state


@pytest.fixture(scope="module", params=MIXERS)
def case(request):
    return Case(*MIXERS[request.param])


def resets():
    """No reset; one on the first token; a short document on a cut; neighbouring ones, one last."""
    reset = np.zeros((BATCH, TIME), bool)
    reset[1, [0, 9]] = reset[2, [6, 7, 8]] = reset[3, [2, 4, 5, 15]] = True
    return jnp.asarray(reset)


def test_prefill_then_decode_and_odd_pieces_give_the_full_run(case):
    full, final = case.run(case.x, None, resets())
    for sizes in ([7] + [1] * 9, [7, 2, 7]):
        y, state = case.pieces(sizes, case.x, resets())
        close(y, full, 1e-5)
        if final is not None:
            close(state, final, 1e-5)


def test_packed_documents_give_what_each_gives_alone(case):
    packed, _ = case.run(case.x, None, resets())
    starts = [[0], [0, 9], [0, 6, 7, 8], [0, 2, 4, 5, 15]]
    for number in range(max(map(len, starts))):
        begin = [row[min(number, len(row) - 1)] for row in starts]
        end = [[*row[number + 1 :], TIME][0] for row in starts]
        alone = jnp.stack([jnp.roll(x, -b, axis=0) for x, b in zip(case.x, begin, strict=True)])
        y, _ = case.run(alone, None, case.none)
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            close(packed[row, b:e], y[row, : e - b], 1e-5)


def test_left_padded_prompts_go_on_as_if_alone(case):
    padding = [0, 3, 6, 5]
    reset = np.zeros((BATCH, TIME), bool)
    reset[np.arange(BATCH), padding] = True
    y, _ = case.pieces([7] + [1] * 9, case.x, jnp.asarray(reset))
    alone = jnp.stack([jnp.roll(x, -p, axis=0) for x, p in zip(case.x, padding, strict=True)])
    full, _ = case.run(alone, None, case.none)
    for row, p in enumerate(padding):
        close(y[row, p:], full[row, : TIME - p], 1e-5)


def test_a_document_that_is_not_finite_reaches_no_other(case):
    bad = case.x.at[1:3, 3].set(jnp.nan)
    for run in (
        lambda x: case.run(x, None, resets())[0],
        lambda x: case.pieces([7] + [1] * 9, x, resets())[0],
        lambda x: case.pieces([7, 2, 7], x, resets())[0],
    ):
        y, good = run(bad), run(case.x)
        assert jnp.isnan(y[1:3, 3]).all()
        close((y[0], y[1, 9:], y[2, 6:], y[3]), (good[0], good[1, 9:], good[2, 6:], good[3]), 1e-6)


def test_gradients_pass_through_the_state(case):
    """Those of two pieces, with documents that run over the cut, are those of the full run."""
    graph, params = nnx.split(case.model)
    ct = jax.random.normal(jax.random.key(2), case.x.shape, case.x.dtype)

    def full(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, None, resets())[0] * ct)

    def pieces(params, x):
        model = nnx.merge(graph, params)
        state = model.init_state(BATCH, CAPACITY, x.dtype)
        first, state = model(x[:, :7], state, resets()[:, :7])
        second, _ = model(x[:, 7:], state, resets()[:, 7:])
        return jnp.sum(jnp.concatenate([first, second], axis=1) * ct)

    actual, desired = jax.jit(lambda *x: [jax.grad(f, (0, 1))(*x) for f in (pieces, full)])(
        params, case.x
    )
    close(actual, desired, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_the_state_is_a_loop_carry(name, dtype):
    case = Case(*MIXERS[name], dtype)
    state = case.model.init_state(BATCH, CAPACITY, dtype)
    for time in (1, 7):
        x, reset = case.x[:, :time], case.none[:, :time]
        y, after = jax.eval_shape(case.run, x, state, reset)
        assert y.shape == x.shape and y.dtype == dtype
        assert jax.tree.structure(state) == jax.tree.structure(after)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.shape[0] == BATCH


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_keeps_a_float32_state(name):
    low, high = Case(*MIXERS[name], jnp.bfloat16), Case(*MIXERS[name])
    y, state = low.run(low.x, None, low.none)
    full, _ = high.run(low.x.astype(jnp.float32), None, high.none)
    close(y.astype(jnp.float32), full, 0.03)
    for leaf in set(state or ()) & {"S", "m", "u", "w"}:
        assert state[leaf].dtype == jnp.float32
    for path, leaf in jax.tree.leaves_with_path(nnx.state(low.model)):
        assert leaf.dtype == jnp.float32, path
