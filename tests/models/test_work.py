"""A sequence over devices computes nothing twice."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from scanax.models import LM, PRESETS, LMConfig, merge, split
from scanax.models.partition import shardings
from scanax.sharding import hlo, mesh

LENGTH = 16384


def work(config, over):
    """Floating-point operations of a step on one device of the mesh."""
    counted = hlo.count(step(config, over, LENGTH).as_text())
    assert counted.unknown == 0
    return counted.flops


def step(config, over, length):
    """The compiled gradient of a row of so many tokens; nothing is allocated."""
    made = mesh.make(over)
    with jax.set_mesh(made):
        graphdef, params, rest = split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
        params = jax.tree.map(
            lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where),
            params,
            shardings(config, params, made),
        )
        ids = jax.ShapeDtypeStruct(
            (1, length), jnp.int32, sharding=mesh.sharding(made, mesh.ROWS, "seq")
        )

        def loss(params, rest, tokens, targets):
            return merge(graphdef, params, rest).nll(tokens, targets)[0].mean()

        return jax.jit(jax.value_and_grad(loss)).lower(params, rest, ids, ids).compile()


@pytest.mark.parametrize(
    "name", ["mamba-130m", "mamba2-130m", "gla-340m", "retnet-1.3b", "tnl-385m"]
)
def test_eight_devices_do_the_work_of_one(name):
    """The smallest of each family, where a summary weighs most; nothing computed again."""
    config = dataclasses.replace(PRESETS[name], remat="none", loss_chunk=0)
    ratio = 8 * work(config, "seq=8") / work(config, "")
    assert 0.99 < ratio < 1.05


@pytest.mark.parametrize("pattern", ["gla+swiglu", "mamba2", "aaren"])
def test_dots_computes_no_product_and_no_kernel_again(pattern):
    """Elementwise work alone, for less memory: as everything again would take a fifth more.

    Without it chains of elementwise steps are computed again as well: what it saves is the rest.
    Eight blocks, for what one takes while it is computed again hides what two keep.
    """
    config = LMConfig(vocab=64, width=32, depth=8, pattern=pattern)
    flops, memory = {}, {}
    for remat in ("none", "dots", "full"):
        compiled = step(dataclasses.replace(config, remat=remat), "", 128)
        flops[remat] = hlo.count(compiled.as_text()).flops
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert flops["dots"] < 1.06 * flops["none"] < flops["full"] / 1.1
    assert memory["full"] < memory["dots"] < 0.8 * memory["none"]
