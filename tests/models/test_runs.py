"""Runs of identical blocks: stacked variables, equal to the blocks one after another."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.models import LM, LMConfig, merge, split
from scanax.models.block import MIXERS, Block, runs
from scanax.models.pattern import Kind
from scanax.sharding import mesh
from support.compare import close

TINY = LMConfig(vocab=50, width=16, depth=4)


def _block(config, kind, layer):
    return Block(config, kind, layer=layer, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - {"lightning"}))
def test_equal_blocks_are_one_run(mixer):
    config = dataclasses.replace(TINY, pattern=f"{mixer}+swiglu", mamba2=_mamba2())
    assert [run.layers for run in runs(config)] == [(0, 1, 2, 3)]


def test_blocks_that_differ_stand_outside():
    lightning = dataclasses.replace(TINY, pattern="lightning+glu")  # LRPE in block 0 only
    assert [run.layers for run in runs(lightning)] == [(0,), (1, 2, 3)]
    mixed = dataclasses.replace(TINY, pattern="gla+swiglu,gla+gelu*2,gla+none")
    assert [run.layers for run in runs(mixed)] == [(0,), (1, 2), (3,)]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_parameters_are_drawn_alike_in_every_layer(mixer):
    """What lets one program draw all layers of a run: a layer's number only changes constants."""
    config = dataclasses.replace(TINY, pattern=f"{mixer}+swiglu", mamba2=_mamba2())

    def draw(layer):
        block = lambda key: Block(  # noqa: E731
            config, Kind(mixer, "swiglu"), layer=layer, rngs=nnx.Rngs(key)
        )
        jaxpr = jax.make_jaxpr(lambda key: nnx.to_pure_dict(nnx.state(block(key), nnx.Param)))
        return str(jaxpr(jax.random.key(0)))

    assert draw(2) == draw(3)


@pytest.mark.parametrize("unroll", [1, 8])
def test_a_run_is_its_blocks_one_after_another(unroll):
    """Lightning: the decays differ from layer to layer, so a wrong slice would be seen."""
    config = dataclasses.replace(TINY, pattern="lightning+glu", unroll=unroll)
    model = LM(config, rngs=nnx.Rngs(1))
    graphdef, params, rest = split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 11)), jnp.int32)

    def each(params, rest):
        model = merge(graphdef, params, rest)
        x = model.embedding[...][tokens]
        for run, stacked in zip(runs(config), model.blocks, strict=True):
            for i, layer in enumerate(run.layers):
                block_def, variables = nnx.split(stacked)
                block = nnx.merge(block_def, jax.tree.map(lambda p, i=i: p[i], variables))
                expected = _block(config, run.kind, layer).mixer.log_decay[...]
                block.mixer.log_decay[...] = expected
                x, _, aux = block(x)
                assert aux == {}
        return model.logits(model.norm(x))

    run = jax.jit(lambda params, rest: merge(graphdef, params, rest)(tokens)[0])
    close(run(params, rest), jax.jit(each)(params, rest), 1e-6)


@pytest.mark.parametrize(
    ("over", "change", "unroll"),
    [
        ("", {}, 8),
        ("", {"unroll": 7}, 1),
        ("", {"remat": "full"}, 1),
        ("", {"remat": "dots"}, 1),
        ("fsdp=2", {}, 1),
        ("pipe=2", {"pipeline": (2, 1)}, 1),
    ],
)
def test_blocks_are_unrolled_where_it_takes_no_memory(over, change, unroll):
    """On one device, without remat, and of no more than so many."""
    config = dataclasses.replace(TINY, depth=8, pattern="conv+swiglu", **change)
    graphdef, params, rest = split(LM(config, rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh.make(over)):
        jaxpr = jax.make_jaxpr(lambda *a: merge(graphdef, *a[:2])(a[2])[0])(
            params, rest, jnp.zeros((4, 8), jnp.int32)
        )
    length = 8 // config.pipeline[0]
    assert [each["unroll"] for each in _scans(jaxpr) if each["length"] == length] == [unroll]


def _scans(jaxpr):
    """The parameters of all scans in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            yield from _scans(inner) if _is_jaxpr(inner) else ()


def _is_jaxpr(x):
    return hasattr(x, "eqns")


def test_initialisation_is_jittable_and_differs_by_layer():
    config = dataclasses.replace(TINY, pattern="gla+swiglu*3,aaren", vocab=500, tie_head=False)

    def draw(key):
        return split(LM(config, rngs=nnx.Rngs(key)))[1]

    params = jax.jit(draw)(jax.random.key(3))
    for name in ("q", "out"):
        kernel = np.asarray(params["blocks"][0]["mixer"][name]["kernel"])
        assert kernel.shape[0] == 3
        assert len({layer.tobytes() for layer in kernel}) == 3
    count = math.prod(params["embedding"].shape)
    for weight in (params["embedding"], params["head"]["kernel"]):
        assert abs(float(jnp.std(weight)) / 0.02 - 1) < 4 / math.sqrt(2 * count)
    assert float(jnp.abs(params["embedding"] - params["head"]["kernel"].T).max()) > 0.01
    other = jax.jit(draw)(jax.random.key(4))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, other)
    constant = {"scale", "bias"}  # norms start at one, GLA's decay bias at zero
    for path, differs in jax.tree.leaves_with_path(changed):
        assert differs == (path[-1].key not in constant), path


def _mamba2():
    from scanax.layers.mamba2 import Mamba2Config

    return Mamba2Config(head_width=8, state=4)
