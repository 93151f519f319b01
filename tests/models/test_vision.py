"""Images: whole, patch by patch, and over devices are one; a class can be read at any patch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.layers import MLPConfig, VirConfig
from scanax.models import (
    VISION_PRESETS,
    ResidualConfig,
    Vision,
    VisionConfig,
    by_layer,
    decayed,
    from_layers,
    merge,
    split,
)
from scanax.models.partition import shardings
from scanax.models.vision import patches
from scanax.sharding import mesh, schedule
from scanax.sharding.schedule import PLAIN, Schedule
from support.compare import close

B = 8
SMALL = VisionConfig(
    image=(8, 16),
    channels=2,
    patch=4,
    classes=5,
    width=16,
    depth=2,
    residual=ResidualConfig(scale=0.5),
    mlp=MLPConfig(hidden=24, bias=True),
    vir=VirConfig(heads=4, init_std=0.2),
    # no biases: a key's changes no softmax, and its gradient is rounding alone
    attention=dataclasses.replace(VisionConfig().attention, heads=4, bias=False, init_std=0.2),
)
BOTH = dataclasses.replace(
    SMALL,
    pattern="vir+gelu,attention+gelu",
    attention=dataclasses.replace(SMALL.attention, causal=True),
)
MODELS = {
    "vir": SMALL,
    "vir, twice": dataclasses.replace(SMALL, bidirectional=True),
    "vit": dataclasses.replace(SMALL, pattern="attention+gelu"),
    "both": BOTH,
    "both, twice": dataclasses.replace(BOTH, bidirectional=True),
}
N = 8  # patches of these images


def images(rows=B):
    return np.random.default_rng(0).normal(size=(rows, 8, 16, 2)).astype(np.float32)


def model_of(config):
    """A model whose every number, biases too, is drawn: zeros would hide what they multiply."""
    graphdef, params, rest = split(Vision(config, rngs=nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), params
    )
    return graphdef, params, rest


@pytest.fixture(scope="module")
def streams():
    """For each model that streams: whole(patches), and read(patches, state) -> (logits, state)."""
    found = {}
    for name in ("vir", "both"):
        graphdef, params, rest = model_of(MODELS[name])
        model = merge(graphdef, params, rest)

        @jax.jit
        def read(patches, state, model=model):
            state = model.read(patches, state)
            return model.classify(state), state

        found[name] = jax.jit(model.__call__), read, model.init_state(B)
    return found


@pytest.mark.parametrize("name", ["vir", "both"])
def test_any_cut_of_an_image_gives_its_class(streams, name):
    """Rows of patches, and patches one by one: the class token is run from a copy of the state."""
    whole, read, empty = streams[name]
    x = patches(jnp.asarray(images()), 4)
    logits = whole(x)
    for size in (N // 2, 1):
        state = empty
        for at in range(0, N, size):
            found, state = read(x[:, at : at + size], state)
        close(found, logits, 1e-5)
        assert (state["position"] == N).all()
    beyond, _ = read(x[:, :1], state)
    assert jnp.isnan(beyond).all()  # an image has no more patches


def test_the_order_of_patches():
    """Row by row; of a patch first its upper row, and of a pixel its channels."""
    x = np.arange(8 * 16 * 2, dtype=np.float32).reshape(1, 8, 16, 2)
    found = np.asarray(patches(jnp.asarray(x), 4))
    assert found.shape == (1, N, 32)
    np.testing.assert_array_equal(found[0, 0, :10], [*x[0, 0, :4].ravel(), *x[0, 1, 0]])
    np.testing.assert_array_equal(found[0, 1, 0], x[0, 0, 4, 0])
    np.testing.assert_array_equal(found[0, 4, 0], x[0, 4, 0, 0])


def test_what_tokens_have_seen():
    """The class token: every patch. The first patch: none after it where mixers are causal, all
    where patches are read twice (its second reading) and in a ViT."""
    x = patches(jnp.asarray(images(1)), 4)
    seen = {}
    for name in ("vir", "vir, twice", "vit"):
        config = MODELS[name]
        graphdef, params, rest = model_of(config)

        @jax.jit
        def reached(params, x, graphdef=graphdef, rest=rest, twice=config.bidirectional):
            model = merge(graphdef, params, rest)

            def first(x):
                x = model.embed(x)
                x = jnp.concatenate([x, x[:, ::-1]], axis=1) if twice else x
                return model.mix(x)[0][:, -1 if twice else 0].sum()

            by_class = jax.grad(lambda x: model(x)[:, 0].sum())(x)
            return [jnp.abs(g).max(axis=(0, 2)) > 1e-4 for g in (by_class, jax.grad(first)(x))]

        by_class, by_first = reached(params, x)
        assert by_class.all(), name
        seen[name] = int(by_first.sum())
    assert seen == {"vir": 1, "vir, twice": N, "vit": N}


MESHES = {
    "vir": ("fsdp=2,seq=2,tensor=2", Schedule(matmul="ring")),
    "vit": ("fsdp=2,seq=2,tensor=2", PLAIN),
    "both, twice": ("data=2,seq=4", Schedule(attention="ring")),
    "vir, twice": ("pipe=2,data=2,tensor=2", PLAIN),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_nothing(name):
    """Nine or seventeen tokens are filled up with a document of their own."""
    (over, how), config = MESHES[name], MODELS[name]
    made, x = mesh.make(over), patches(jnp.asarray(images()), 4)
    staged = dataclasses.replace(config, pipeline=(made.shape["pipe"], 1))
    graphdef, params, rest = model_of(config)

    def gradients(graphdef, rest):
        def loss(params, x):
            y = merge(graphdef, params, rest)(x)
            return jnp.sum(y**2), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, logits), grads = gradients(graphdef, rest)(params, x)
    graphdef, _, rest = split(Vision(staged, rngs=nnx.Rngs(0)))
    placed = from_layers(staged, by_layer(config, params), Vision)
    placed = jax.device_put(placed, shardings(staged, placed, made))
    rows = jax.device_put(x, mesh.sharding(made, mesh.ENDS, "seq"))
    with jax.set_mesh(made), schedule.using(how):
        (_, found), theirs = gradients(graphdef, rest)(placed, rows)
    close(found, logits, 1e-5)
    close(by_layer(staged, theirs), by_layer(config, grads), 1e-4)


def test_weight_decay_is_of_matrices():
    params = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: Vision(SMALL, rngs=nnx.Rngs(0))), nnx.Param)
    )
    found = {True: set(), False: set()}
    for path, applies in jax.tree_util.tree_leaves_with_path(decayed(params)):
        found[applies].add(path[-1].key)
    assert found[True] == {"kernel"}
    assert found[False] == {"bias", "scale", "class_token", "position", "mixer_scale", "mlp_scale"}


def test_scale_multiplies_what_a_branch_adds():
    """LayerScale: of 1 it is as none, of 0 the blocks do nothing."""
    x, found = patches(jnp.asarray(images(2)), 4), {}
    for scale in (None, 1.0, 0.0):
        config = dataclasses.replace(SMALL, residual=ResidualConfig(scale=scale))
        graphdef, params, rest = split(Vision(config, rngs=nnx.Rngs(0)))

        @jax.jit
        def run(params, x, graphdef=graphdef, rest=rest):
            model = merge(graphdef, params, rest)
            return model(x), model.output(model.norm(model.token(2)))[:, 0]

        found[scale], blank = run(params, x)
    close(found[None], found[1.0], 1e-6)
    close(found[0.0], blank, 1e-6)
    assert jnp.abs(found[1.0] - blank).max() > 0.1 * jnp.abs(blank).max()


@pytest.mark.parametrize("size, width, heads", [("s", 384, 6), ("b", 768, 12)])
def test_published_sizes(size, width, heads):
    """12 blocks of the paper's widths, with a ViT's parameters and RetNet's weight of a head."""
    config = VISION_PRESETS[f"vir-{size}"]
    shapes = nnx.eval_shape(lambda: Vision(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    projections = 4 * (width**2 + width) + 8 * width**2 + 5 * width
    block = projections + 2 * 2 * width + 2 * width + width // heads  # norms, scales, a head's
    rest = (16 * 16 * 3 + 1 + 14 * 14 + 1) * width + 2 * width + (width + 1) * 1000
    assert count == 12 * block + rest
    assert abs(count / {"s": 22.05e6, "b": 86.57e6}[size] - 1) < 1e-3  # a ViT with its class token


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch": 3}, "patch=3 does not divide an image of 8 x 16"),
        ({"classes": 0}, "classes=0; it must be at least 1"),
        ({"norm": "batch"}, "norm='batch' is not one of rms, layer, simple"),
    ],
)
def test_configs_that_cannot_be(change, says, unchecked):
    with pytest.raises(ValueError, match=f"^{says}$"):
        dataclasses.replace(SMALL, **change)


def test_models_that_see_all_at_once_have_no_state():
    for name in ("vir, twice", "vit"):
        with pytest.raises(ValueError, match=r"reads an image's patches all at once"):
            Vision(MODELS[name], rngs=nnx.Rngs(0)).init_state(1)
    with pytest.raises(ValueError, match="7 patches; images have 2 x 4"):
        Vision(SMALL, rngs=nnx.Rngs(0))(jnp.zeros((1, 7, 32), jnp.float32))
