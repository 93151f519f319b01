"""GLA, Retention and Lightning compute what their papers say, however the stream is cut.

Each is written out once more in float64 NumPy, one token after the other, with every document of a
packed row on its own. The norms' epsilon is 1 here: a small one would hide the scale of q and k.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import decay
from scanax.layers.constant import Constant
from scanax.layers.depth import Depth
from scanax.layers.gla import GLA, GLAConfig
from scanax.layers.lightning import Lightning, LightningConfig
from scanax.layers.retention import Retention, RetentionConfig
from support.compare import close

WIDTH, BATCH, TIME, DEPTH = 24, 3, 12, 3
MIXERS = {
    # name: mixer, config, layer
    "gla": (GLA, GLAConfig(heads=2, norm_eps=1.0), 0),
    "gla, all options": (
        GLA,
        GLAConfig(
            heads=4,
            kv_heads=2,
            conv=3,
            decay_min=-0.04,
            value_ratio=0.5,
            norm_scale=False,
            norm_eps=1.0,
        ),
        1,
    ),
    "retention": (Retention, RetentionConfig(heads=4, kv_heads=2, norm_eps=1.0), 0),
    "retention, convolved": (
        Retention,
        RetentionConfig(heads=4, kv_heads=2, conv=3, norm_eps=1.0),
        1,
    ),
    "retention, torchscale": (
        Retention,
        RetentionConfig(
            heads=2,
            interleaved=True,
            inclusive=True,
            scale_keys=True,
            norm_scale=False,
            norm_eps=1.0,
        ),
        1,
    ),
    "lightning, first layer": (Lightning, LightningConfig(heads=3, norm_eps=1.0), 0),
    "lightning": (Lightning, LightningConfig(heads=3, decay="paper", norm_eps=1.0), 1),
    "lightning, minimax": (
        Lightning,
        LightningConfig(
            heads=3,
            head_width=4,
            lrpe_layers=0,
            decay="minimax",
            silu_values=True,
            sigmoid_gate=True,
            norm_scale=True,
            norm_eps=1.0,
        ),
        0,
    ),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def by_head(x, heads, groups):
    return np.repeat(x.reshape(len(x), groups, -1), heads // groups, axis=1)


def recurrence(q, k, v, log_decay):
    state, y = np.zeros((q.shape[1], k.shape[2], v.shape[2])), []
    for t in range(len(q)):
        state = np.exp(log_decay[t])[..., None] * state + k[t][..., None] * v[t][:, None]
        y.append(np.einsum("hk,hkv->hv", q[t], state))
    return np.stack(y)


def normed(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1)


def projected(p, config, x):
    """q, k and v of every head, convolved where the config says so."""
    heads, groups = config.heads, config.kv_heads or config.heads
    for name, n in (("q", heads), ("k", groups), ("v", groups)):
        y = x @ p[name]["kernel"]
        if config.conv:
            taps = p["conv"][name]["kernel"]
            past = np.concatenate([np.zeros((len(taps) - 1, y.shape[1])), y])
            y = silu(sum(w * past[j : j + len(x)] for j, w in enumerate(taps)))
        yield by_head(y, heads, n)


def gla(p, config, layer, x):
    """One document x (T, D)."""
    heads, groups = config.heads, config.kv_heads or config.heads
    q, k, v = projected(p, config, x)
    gate = x @ p["decay_down"]["kernel"] @ p["decay_up"]["kernel"] + p["decay_up"]["bias"]
    log_decay = np.log(sigmoid(by_head(gate, heads, groups))) / 16
    if config.decay_min is not None:
        log_decay = np.maximum(log_decay, config.decay_min)
    y = recurrence(q / np.sqrt(q.shape[-1]), k, v, log_decay)
    y = normed(y) * (p["norm"]["scale"] if config.norm_scale else 1)
    return (y.reshape(len(x), -1) * silu(x @ p["gate"]["kernel"])) @ p["out"]["kernel"]


def retention(p, config, layer, x):
    """The parallel form: (Q K^T * D) V, as the paper has it."""
    heads, (q, k, v) = config.heads, projected(p, config, x)
    time, half = np.arange(len(x)), q.shape[-1] // 2
    exponents = np.linspace(0, 1, half) if config.inclusive else np.arange(half) / half
    turn = np.exp(1j * time[:, None, None] / 10000**exponents)

    def rotate(y):
        pairs = (
            (y[..., ::2], y[..., 1::2]) if config.interleaved else (y[..., :half], y[..., half:])
        )
        return (pairs[0] + 1j * pairs[1]) * turn

    scores = np.einsum("thk,shk->hts", rotate(q), rotate(k).conj()).real / np.sqrt(2 * half)
    lag = time[:, None] - time
    gamma = (1 - 2.0 ** (-5 - np.arange(heads)))[:, None, None]
    mask = np.where(lag >= 0, gamma ** np.maximum(lag, 0), 0)
    y = normed(np.einsum("hts,shv->thv", scores * mask, v))
    if config.norm_scale:
        y = y * p["norm"]["scale"]
    return (y.reshape(len(x), -1) * silu(x @ p["gate"]["kernel"])) @ p["out"]["kernel"]


def lightning(p, config, layer, x):
    """The parallel form, with LRPE as the sum over features of cos(theta (t - s)) q k."""
    heads, time = config.heads, np.arange(len(x))
    q, k, v = (by_head(x @ p[name]["kernel"], heads, heads) for name in "qkv")
    q, k, v = silu(q), silu(k), silu(v) if config.silu_values else v
    lag = time[:, None] - time
    products = np.einsum("thk,shk->htsk", q, k)
    if layer < config.lrpe_layers:
        products = products * np.cos(lag[None, :, :, None] * p["theta"][:, None, None])
    slopes = {
        "released": np.array([2.0**-4, 2.0**-8, 2.0**-2]) * (1 - layer / (DEPTH - 1) + 1e-5),
        "paper": 8 / heads * np.arange(1, heads + 1) * (1 - (layer + 1) / DEPTH),
        "minimax": 2.0 ** (-8 / heads * np.arange(1, heads + 1)) * (1 + 1e-5),
    }[config.decay]
    mask = np.where(lag >= 0, np.exp(-slopes[:, None, None] * np.maximum(lag, 0)), 0)
    y = normed(np.einsum("hts,shv->thv", products.sum(-1) * mask, v).reshape(len(x), -1))
    if config.norm_scale:
        y = y * p["norm"]["scale"]
    gate = x @ p["gate"]["kernel"]
    return (y * (sigmoid(gate) if config.sigmoid_gate else gate)) @ p["out"]["kernel"]


MEANING = {GLA: gla, Retention: retention, Lightning: lightning}
STARTS = [[0], [0, 5], [0, 4, 5, 11]]


def resets():
    reset = np.zeros((BATCH, TIME), bool)
    reset[0, 3] = True  # three tokens of padding, whatever they are, and then a prompt
    for row, starts in enumerate(STARTS[1:], start=1):
        reset[row, starts[1:]] = True
    return jnp.asarray(reset)


class Case:
    """A mixer with random parameters, these in float64, and its jitted call."""

    def __init__(self, mixer, config, layer, dtype=jnp.float32):
        def build():
            model = mixer(WIDTH, config, depth=Depth(layer, DEPTH), dtype=dtype, rngs=nnx.Rngs(0))
            return nnx.split(model, nnx.Param, ...)

        graph, params, _ = nnx.eval_shape(build)
        rest, rng = jax.jit(lambda: build()[2])(), np.random.default_rng(layer)
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), params)
        self.model = nnx.merge(graph, params, rest)
        self.run = jax.jit(lambda *inputs: nnx.merge(graph, params, rest)(*inputs))
        self.params = jax.tree.map(np.float64, nnx.to_pure_dict(params))
        self.x = jnp.asarray(rng.normal(size=(BATCH, TIME, WIDTH)), dtype)
        self.mean = lambda x: MEANING[mixer](self.params, config, layer, np.float64(x))


@pytest.fixture(scope="module", params=MIXERS)
def case(request):
    return Case(*MIXERS[request.param])


def test_a_packed_stream_in_one_piece_or_many_is_its_definition(case):
    documents = [[(3, TIME)], *([*zip(s, [*s[1:], TIME], strict=True)] for s in STARTS[1:])]
    full, final = case.run(case.x, None, resets())
    state, outputs, at = case.model.init_state(BATCH, TIME, jnp.float32), [], 0
    for size in (4, 1, 1, 4, 1, 1):
        piece = slice(at, at + size)
        y, state = case.run(case.x[:, piece], state, resets()[:, piece])
        outputs.append(y)
        at += size
    streamed = jnp.concatenate(outputs, axis=1)
    close(streamed, full, 1e-5)
    close(state, final, 1e-5)
    for row, spans in enumerate(documents):
        for begin, end in spans:
            desired = case.mean(case.x[row, begin:end])
            close(full[row, begin:end], desired, 1e-5)
            close(streamed[row, begin:end], desired, 1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_keeps_states_decays_and_parameters_in_float32(name):
    case = Case(*MIXERS[name], jnp.bfloat16)
    y, state = case.run(case.x, None, resets())
    assert y.dtype == jnp.bfloat16
    close(y[0, 3:].astype(jnp.float32), case.mean(case.x[0, 3:]), 0.03)
    initial = case.model.init_state(BATCH, TIME, jnp.bfloat16)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), initial)
    assert state["S"].dtype == jnp.float32
    for leaf in jax.tree.leaves(nnx.state(case.model, (nnx.Param, Constant))):
        assert leaf.dtype == jnp.float32


def kernels(model):
    return {
        name: np.asarray(getattr(model, name).kernel[...])
        for name in ("q", "k", "v", "gate", "out", "decay_down", "decay_up")
        if hasattr(model, name)
    }


def test_initial_values_are_the_published_ones():
    width, rngs = 256, nnx.Rngs(0)
    for model in (GLA(width, rngs=rngs), Lightning(width, rngs=rngs)):
        for kernel in kernels(model).values():
            assert 0.019 < kernel.std() < 0.021 and kernel.max() > 0.05
    assert not np.any(GLA(width, rngs=rngs).decay_up.bias[...])

    def spread_evenly(kernel, limit):
        assert 0.97 * limit < np.abs(kernel).max() <= limit * (1 + 1e-6)
        assert abs(kernel.std() * np.sqrt(3) / limit - 1) < 0.03

    paper = kernels(GLA(width, GLAConfig(init_std=None), rngs=rngs))
    for name in ("q", "k", "decay_down", "decay_up"):
        spread_evenly(paper[name], 2**-2.5 * np.sqrt(6 / sum(paper[name].shape)))
    for name in ("v", "gate", "out"):
        spread_evenly(paper[name], width**-0.5)
    for name, kernel in kernels(Retention(width, rngs=rngs)).items():
        gain = 2**-1 if name == "out" else 2**-2.5
        spread_evenly(kernel, gain * np.sqrt(6 / sum(kernel.shape)))

    theta = np.asarray(Lightning(width, rngs=rngs).theta[...])
    close(theta.reshape(-1), 10000.0 ** (-2 * np.arange(width) / width), 1e-6)
    assert not hasattr(Lightning(width, depth=Depth(1, 2), rngs=rngs), "theta")


def test_decays():
    close(decay.alibi_slopes(8), 2.0 ** -np.arange(1, 9), 0)
    close(decay.alibi_slopes(6), 2.0 ** -np.array([2, 4, 6, 8, 1, 3]), 0)
    close(decay.alibi_slopes(1), np.array([2.0**-8]), 0)
    close(decay.lightning("released", 4, 0, 1), -decay.alibi_slopes(4) * (1 + 1e-5), 1e-12)
    close(decay.lightning("released", 4, 2, 3), -decay.alibi_slopes(4) * 1e-5, 1e-9)
    close(decay.lightning("paper", 4, 1, 4), -np.array([1.0, 2.0, 3.0, 4.0]), 1e-12)
    assert not decay.lightning("paper", 4, 3, 4).any()
    close(decay.lightning("fla", 4, 1, 4), -1.5 * np.array([0.0, 1.0, 2.0, 3.0]), 1e-12)
    close(decay.lightning("minimax", 4, 1, 2)[0], -0.25 * 2e-5, 1e-3)
    # 1 - 2^-35 is 1 in float32; its logarithm is not 0
    last = Retention(128, RetentionConfig(heads=32), rngs=nnx.Rngs(0)).log_decay[...][-1]
    np.testing.assert_allclose(last, -(2.0**-36), rtol=1e-6)
    # constants are not parameters
    assert not hasattr(nnx.state(Retention(64, rngs=nnx.Rngs(0)), nnx.Param), "log_decay")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rngs: GLA(30, rngs=rngs), "GLA of width 30: 4 heads must divide the key width 15"),
        (lambda rngs: GLA(32, GLAConfig(kv_heads=3), rngs=rngs), "3 kv_heads must divide 4 heads"),
        (lambda rngs: Retention(12, rngs=rngs), "divide the key width 12 into even parts"),
        (lambda rngs: Lightning(30, rngs=rngs), "lightning of width 30: 4 heads must divide it"),
        (
            lambda rngs: Lightning(32, LightningConfig(decay="late"), rngs=rngs),
            "decay='late'; it is one of",
        ),
    ],
)
def test_what_does_not_fit_is_named(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
