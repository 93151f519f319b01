"""Parameters by layer number, whatever is scanned together; and the weight-decay mask."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from scanax.layers.mamba2 import Mamba2Config
from scanax.models import LM, LMConfig, by_layer, decayed, from_layers, merge, split
from support.compare import close

CONFIG = LMConfig(
    vocab=50,
    width=16,
    depth=8,
    pattern="gla+swiglu*2,retention+gelu,lightning+glu,mamba,mamba2,aaren,attention+geglu",
    mamba2=Mamba2Config(head_width=8, state=4),
)


def _abstract(config):
    return split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))


@functools.cache
def _numbered():
    """Parameters whose every element is different, without drawing any."""
    shapes = _abstract(CONFIG)[1]
    leaves, structure = jax.tree.flatten(shapes)
    filled, start = [], 0
    for leaf in leaves:
        filled.append((start + jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(structure, filled)


def test_split_and_merge_are_inverse():
    model = LM(dataclasses.replace(CONFIG, depth=1, pattern="retention"), rngs=nnx.Rngs(0))
    graphdef, params, rest = split(model)
    assert type(params) is dict and type(params["blocks"][0]["mixer"]["q"]) is dict
    again = split(merge(graphdef, params, rest))
    assert again[0] == graphdef
    close(again[1:], (params, rest), 0)
    assert not any("log_decay" in str(path) for path, _ in jax.tree.leaves_with_path(params))


def test_blocks_one_by_one_are_the_same_model():
    """From the same parameters by layer; every run has one layer."""
    model = LM(CONFIG, rngs=nnx.Rngs(0))
    one = dataclasses.replace(model.config, stacked=False)
    graphdef, _, rest = split(LM(one, rngs=nnx.Rngs(1)))
    params = from_layers(one, by_layer(model.config, split(model)[1]))
    assert len(params["blocks"]) == 8 > len(split(model)[1]["blocks"])
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    close(jax.jit(merge(graphdef, params, rest))(tokens), jax.jit(model)(tokens), 1e-5)


def test_by_layer_and_back():
    params = _numbered()
    flat = by_layer(CONFIG, params)
    assert flat["layers.1.mixer.q.kernel"].shape == (16, 8)
    assert (flat["layers.1.mixer.q.kernel"] == params["blocks"][0]["mixer"]["q"]["kernel"][1]).all()
    assert {name.split(".")[1] for name in flat if name.startswith("layers.")} == set("01234567")
    assert {name for name in flat if not name.startswith("layers.")} == {"embedding", "norm.scale"}
    assert sum(x.size for x in flat.values()) == sum(x.size for x in jax.tree.leaves(params))
    close(from_layers(CONFIG, flat), params, 0)
    shapes = jax.eval_shape(lambda p: by_layer(CONFIG, p), params)
    assert jax.tree.map(jnp.shape, flat) == jax.tree.map(lambda x: x.shape, shapes)


def test_names_do_not_depend_on_how_blocks_are_grouped():
    """A block keeps its names and shapes when its neighbours change and it leaves a run."""
    alone = dataclasses.replace(CONFIG, pattern="gla+swiglu,gla+gelu", depth=4)
    together = dataclasses.replace(CONFIG, pattern="gla+swiglu", depth=4)
    apart, joined = (
        jax.eval_shape(lambda p, c=c: by_layer(c, p), _abstract(c)[1]) for c in (alone, together)
    )
    assert len(_abstract(alone)[1]["blocks"]) == 4 and len(_abstract(together)[1]["blocks"]) == 1
    for layer in (0, 2):
        mine = f"layers.{layer}."
        assert {n: x.shape for n, x in apart.items() if n.startswith(mine)} == {
            n: x.shape for n, x in joined.items() if n.startswith(mine)
        }


def test_a_wrong_set_of_layers_is_named():
    flat = by_layer(CONFIG, _numbered())
    extra = {**flat, "layers.8.mixer.q.kernel": flat["layers.0.mixer.q.kernel"]}
    with pytest.raises(ValueError, match=r"layers\.8\.mixer\.q\.kernel is not a parameter"):
        from_layers(CONFIG, extra)
    for gone in ("layers.1.mixer.q.kernel", "layers.4.mixer.D", "norm.scale"):
        with pytest.raises(ValueError, match=f"^{re.escape(gone)} is missing"):
            from_layers(CONFIG, {name: leaf for name, leaf in flat.items() if name != gone})
    other = {**flat, "layers.4.mixer.D": flat["layers.4.mixer.D"][1:]}
    with pytest.raises(ValueError, match=r"layers\.4\.mixer\.D has shape \(31,\).*\(32,\)"):
        from_layers(CONFIG, other)


def test_weight_decay_applies_to_matrices_only():
    pattern = "lightning+glu,retention+gelu,gla+swiglu*2,mamba,mamba2,aaren,attention+swiglu"
    config = dataclasses.replace(CONFIG, tie_head=False, norm="layer", pattern=pattern)
    mask = decayed(_abstract(config)[1])
    names = {True: set(), False: set()}
    for path, applies in jax.tree.leaves_with_path(mask):
        names[applies].add(path[-1].key)
    assert names[True] == {"kernel", "embedding"}
    assert names[False] == {"A_log", "D", "bias", "dt_bias", "scale", "theta", "token"}
