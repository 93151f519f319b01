"""Collective matmul: one device's products, in blocks that travel while others are computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.sharding import hlo, matmul, mesh, schedule
from support.compare import close

B, T, D, F, DEVICES = 4, 24, 10, 16, 4


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def block(x, into, back):
    """Two products by columns that share an exchange, and one by rows."""
    whole, (gate, up) = matmul.by_columns(x, into)
    return matmul.by_rows(jnp.tanh(gate) * up, back), whole


def plain(x, into, back):
    return jnp.tanh(x @ into[0]) * (x @ into[1]) @ back, x


def both(function):
    def loss(*args):
        y, whole = function(*args)
        return jnp.sin(y).sum() + (whole**2).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


ARGS = draw(B, T, D), [draw(D, F), draw(D, F) / 2], draw(F, D)


@pytest.mark.parametrize("over", ["data=2,tensor=4", "seq=2,tensor=3", "fsdp=2,seq=2,tensor=2"])
def test_it_is_the_product(over):
    if "3" in over:
        into, back = [k[:, :15] for k in ARGS[1]], ARGS[2][:15]
        args = (ARGS[0], into, back)
    else:
        args = ARGS
    with jax.set_mesh(mesh.make(over)):
        ours = both(block)(*args)
    close(ours, both(plain)(*args), 1e-5)


def test_bfloat16_is_summed_in_float32():
    """Gradients against those in float64 of the same rounded inputs: ours are no worse than one
    device's."""
    args = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), ARGS)

    def rms(grads, true):
        errors = jax.tree.map(
            lambda g, t: np.sqrt(np.mean((np.float64(g) - t) ** 2) / np.mean(t**2)), grads, true
        )
        return max(jax.tree.leaves(errors))

    with jax.enable_x64(True):
        true = both(plain)(*jax.tree.map(lambda x: jnp.asarray(np.float64(x)), args))[1]
        true = jax.tree.map(np.asarray, true)
    with jax.set_mesh(mesh.make("tensor=8")):
        ours = both(block)(*args)[1]
    assert rms(ours, true) < 1.1 * rms(both(plain)(*args)[1], true)


def compiled(function):
    with jax.set_mesh(mesh.make(f"tensor={DEVICES}")):
        return jax.jit(function).lower(*ARGS).compile().as_text()


def test_what_travels_is_what_a_gather_and_a_scatter_would():
    counted = hlo.count(compiled(lambda *args: block(*args)[0]))
    once = (DEVICES - 1) / DEVICES * B * T * D * 4
    assert counted.calls == {"collective-permute": 2 * (DEVICES - 1)}
    assert counted.received == {"collective-permute": 2 * once}


def test_products_are_independent_of_the_exchange_beside_them():
    """In the program's order every exchange has products between it and what waits for it."""
    text = compiled(lambda *args: block(*args)[0])
    computations, entry = hlo.parse(text)
    body = computations[entry]
    product = {
        one.name
        for one in body
        if one.opcode == "dot"
        or any(
            "dot" in {i.opcode for i in computations[name]}
            for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", one.attributes)
        )
    }
    permutes = [one for one in body if one.opcode.startswith("collective-permute")]
    needs: dict[str, set[str]] = {}
    for one in body:
        direct = set(one.operands)
        needs[one.name] = direct.union(*(needs.get(name, set()) for name in direct))
    for permute in permutes:
        free = {p for p in product if permute.name not in needs[p] and p not in needs[permute.name]}
        assert free, f"nothing can be computed while {permute.name} is under way"


def test_a_length_that_does_not_divide_is_said_at_once():
    x = jnp.zeros((2, 10, 4), jnp.float32)
    how = schedule.Schedule(matmul="ring")
    says = "length=10 does not divide over seq=2 x tensor=2 devices; 8 or 12 would"
    with (
        jax.set_mesh(mesh.make("seq=2,tensor=2")),
        schedule.using(how),
        pytest.raises(ValueError, match=says),
    ):
        matmul.stream(x)
