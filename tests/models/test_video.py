"""Models of video: any cut of a stream, roll-outs, meshes, sizes of the paper, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers.attention import AttentionConfig
from scanax.layers.convlstm import ConvLSTMConfig
from scanax.layers.convs5 import ConvS5Config
from scanax.models import VIDEO_PRESETS, LMConfig, Video, VideoConfig, by_layer, merge, split
from scanax.models.layout import from_layers, shapes
from scanax.models.partition import shardings, state_shardings
from scanax.sharding import mesh
from support.compare import close

B, T = 2, 4
TINY = VideoConfig(
    size=(8, 12),
    patch=4,
    stages=(4,),
    groups=2,
    width=8,
    depth=2,
    convs5=ConvS5Config(block="resnet", groups=2),
    convlstm=ConvLSTMConfig(hidden=4),
    attention=AttentionConfig(heads=2, init_std=0.3),
)
PATTERNS = ("convs5", "convlstm", "attention+gelu")


@functools.cache
def parts(pattern):
    return split(Video(dataclasses.replace(TINY, pattern=pattern), rngs=nnx.Rngs(0)))


@functools.cache
def forward(pattern):
    graphdef, _, rest = parts(pattern)
    return jax.jit(lambda params, *given: merge(graphdef, params, rest)(*given))


def frames(time=T, seed=0):
    return jax.random.uniform(jax.random.key(seed), (B, time, 8, 12, 1), jnp.float32, -1, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stream_in_pieces_is_the_whole_and_causal(pattern):
    (graphdef, params, rest), run, x = parts(pattern), forward(pattern), frames()
    full, _ = run(params, x, None)
    assert full.shape == x.shape and full.dtype == jnp.float32 and jnp.abs(full).max() < 1
    state, found = merge(graphdef, params, rest).init_state(B, T), []
    kinds = jax.tree.map(lambda s: (s.shape, s.dtype), state)
    for start, stop in ((0, 2), (2, 3), (3, 4)):
        y, state = run(params, x[:, start:stop], state)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == kinds
        found.append(y)
    close(jnp.concatenate(found, 1), full, 1e-5)
    changed, _ = run(params, x.at[:, 1].set(frames(seed=1)[:, 1]), None)
    close(changed[:, 0], full[:, 0], 1e-6)
    for later in range(1, T):  # and what was seen is remembered
        assert jnp.abs(changed[:, later] - full[:, later]).max() > 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generated_frames_are_predictions_fed_back(pattern):
    """Causal, so that one length serves all: what is not known yet changes nothing."""
    graphdef, params, rest = parts(pattern)
    made = jax.jit(lambda p, x: merge(graphdef, p, rest).generate(x, T - 2))(
        params, frames()[:, :2]
    )
    x = frames()
    for t in range(2, T):
        after, _ = forward(pattern)(params, x, None)
        x = x.at[:, t].set(after[:, t - 1])
    close(made, x[:, 2:], 1e-5)


@pytest.mark.parametrize(
    ("pattern", "over"),
    [
        ("convs5", "seq=2,tensor=2"),
        ("convs5", "data=2,fsdp=2"),
        ("convs5", "pipe=2"),
        ("convlstm", "data=2,fsdp=2"),
        ("attention+gelu", "data=2,seq=2"),
    ],
)
def test_a_mesh_changes_nothing(pattern, over):
    made = mesh.make(over)
    config = dataclasses.replace(TINY, pattern=pattern)
    rows = jnp.tile(frames(5), (2, 1, 1, 1, 1))

    def program(config):
        graphdef, params, rest = split(Video(config, rngs=nnx.Rngs(0)))

        def loss(params, x, y):
            after, _ = merge(graphdef, params, rest)(x, None)
            return ((after - y) ** 2).mean(), after

        return params, jax.jit(jax.value_and_grad(loss, has_aux=True))

    params, both = program(config)
    expected, gradients = both(params, rows[:, :-1], rows[:, 1:])
    piped = dataclasses.replace(config, pipeline=(made.shape["pipe"], 1))
    _, both = program(piped)
    placed = jax.device_put(params, shardings(piped, params, made))
    with jax.set_mesh(made):
        given = jax.device_put((rows[:, :-1], rows[:, 1:]), mesh.sharding(made, mesh.ROWS, "seq"))
        actual, spread = both(placed, *given)
    close(actual, expected, 1e-5)
    close(spread, gradients, 1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parameters_by_layer_and_states_have_their_places(pattern):
    config, (graphdef, params, rest) = dataclasses.replace(TINY, pattern=pattern), parts(pattern)
    flat = by_layer(config, params)
    back = from_layers(config, flat, Video)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    state = merge(graphdef, params, rest).init_state(B, T)
    state_shardings(state, mesh.make("data=2,tensor=2"))


@pytest.mark.parametrize(("name", "width"), [("300", 256), ("600", 128)])
def test_the_presets_are_those_of_the_paper(name, width):
    """Moving MNIST: 64 x 64 pixels, three stages to 16 x 16, eight layers of 3 x 3 convolutions."""
    config = VIDEO_PRESETS[f"convs5-moving-mnist-{name}"]
    assert config.frame == (16, 16)
    found = shapes(config, Video)
    layers = {n: s for n, s in found.items() if n.startswith("layers.7.")}
    assert {n: s for n, s in layers.items() if not n.endswith(("bias", "scale"))} == {
        "layers.7.mixer.B.kernel": (3, 3, width, width // 2, 2),
        "layers.7.mixer.C.kernel": (3, 3, width // 2, width, 2),
        "layers.7.mixer.Lambda_re": (width // 2,),
        "layers.7.mixer.Lambda_im": (width // 2,),
        "layers.7.mixer.log_step": (width // 2,),
        "layers.7.mixer.conv_1.kernel": (3, 3, width, width),
        "layers.7.mixer.conv_2.kernel": (3, 3, width, width),
    }
    assert "layers.8.mixer.log_step" not in found
    assert found["encoder.blocks.2.conv_1.kernel"] == (3, 3, 256, 256)
    assert found["decoder.convs.2.kernel"] == (3, 3, 64, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": (8, 10)}, r"size=\(8, 10\) does not divide by 4"),
        ({"patch": 1, "stages": (4, 6), "groups": 4}, r"groups=4 do not divide stages=\(4, 6\)"),
        ({"stages": ()}, "stages=.* at least one"),
        ({"patch": 0}, "patch=0; it must be at least 1"),
        ({"pattern": "convs5+gelu"}, "convs5 stands alone, without .gelu"),
        ({"pattern": "convs5,attention"}, "mixes blocks of frames and of tokens"),
        ({"pattern": "gla+moe"}, "models of video have no moe"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(change, says, unchecked):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY, **change)


def test_stages_go_down_and_come_back():
    """Squares become channels at each stage, and channels squares on the way back."""
    config = dataclasses.replace(TINY, patch=2, stages=(4, 6), depth=1)
    model = nnx.eval_shape(lambda: Video(config, rngs=nnx.Rngs(0)))

    def both(x):
        model = Video(config, rngs=nnx.Rngs(0))
        return model.encoder(x), model(x)[0]

    encoded, after = jax.eval_shape(both, frames())
    assert encoded.shape == (B, T, 2, 3, 8) and after.shape == frames().shape
    kernels = [conv.kernel.shape for conv in model.encoder.convs]
    assert kernels == [(3, 3, 4, 4), (3, 3, 16, 6)]
    assert [conv.kernel.shape for conv in model.decoder.convs] == [(3, 3, 6, 16), (3, 3, 4, 4)]


def test_a_language_model_has_no_frames():
    with pytest.raises(ValueError, match="pattern 'convs5': convs5 is for frames of a video"):
        LMConfig(pattern="convs5")
