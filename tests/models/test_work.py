"""A sequence over devices computes nothing twice."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from scanax.models import LM, PRESETS, merge, split
from scanax.models.partition import shardings
from scanax.sharding import hlo, mesh

LENGTH = 16384


def work(config, over):
    """Floating-point operations of a step on one device of the mesh; nothing is allocated."""
    made = mesh.make(over)
    with jax.set_mesh(made):
        graphdef, params, rest = split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0))))
        params = jax.tree.map(
            lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where),
            params,
            shardings(config, params, made),
        )
        ids = jax.ShapeDtypeStruct(
            (1, LENGTH), jnp.int32, sharding=mesh.sharding(made, mesh.ROWS, "seq")
        )

        def loss(params, rest, tokens, targets):
            return merge(graphdef, params, rest).nll(tokens, targets)[0].mean()

        step = jax.jit(jax.value_and_grad(loss)).lower(params, rest, ids, ids)
    counted = hlo.count(step.compile().as_text())
    assert counted.unknown == 0
    return counted.flops


@pytest.mark.parametrize(
    "name", ["mamba-130m", "mamba2-130m", "gla-340m", "retnet-1.3b", "tnl-385m"]
)
def test_eight_devices_do_the_work_of_one(name):
    """The smallest of each family, where a summary weighs most; nothing computed again."""
    config = dataclasses.replace(PRESETS[name], remat="none", loss_chunk=0)
    ratio = 8 * work(config, "seq=8") / work(config, "")
    assert 0.99 < ratio < 1.05
