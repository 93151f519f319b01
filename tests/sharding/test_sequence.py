"""Every mixer over every axis is the token recurrence: values and all gradients, on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels.dispatch import record
from scanax.kernels.monoid import DECAY, SOFTMAX, resettable, scan
from scanax.sharding import mesh, ops, sequence
from support.compare import close
from support.ladder import BY_NAME, check, problem, with_gradients
from support.targets import tracing

TIME = 64
KERNELS = [
    name
    for name, mixer in BY_NAME.items()
    if any(how["implementation"] == "pallas_tpu" for how in mixer.schedules)
]
MESHES = ("seq=8", "data=2,seq=2,tensor=2")


@pytest.mark.parametrize("over", MESHES)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_mesh_changes_nothing(name, over):
    """Documents begin on a device's first and last token and inside; decays are extreme."""
    mixer = BY_NAME[name]
    with jax.set_mesh(mesh.make(over)):
        run = with_gradients(lambda x, reset: mixer.run(x, reset))
        for case in ("mixed", "mild"):
            inputs, ct, reset, _ = problem(name, case, jnp.float32, TIME)
            reset = reset.copy()
            reset[0, [8, 31, 32]] = True
            answer = exact(name, inputs, ct, reset)
            check(mixer, case, jnp.float32, run(inputs, ct, reset), answer)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_run_on_a_mesh(name):
    """Each device's share goes through the kernel for TPUs, here interpreted."""
    mixer = BY_NAME[name]
    inputs, ct, reset, _ = problem(name, "mixed", jnp.float32, TIME)
    answer = exact(name, inputs, ct, reset)
    with jax.set_mesh(mesh.make(MESHES[1])), tracing("pallas_tpu"), record() as ran:
        got = with_gradients(lambda x, reset: mixer.run(x, reset))(inputs, ct, reset)
    assert {implementation for _, implementation in ran} == {"pallas_tpu"}
    check(mixer, "mixed", jnp.float32, got, answer)


def exact(name, inputs, ct, reset):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, ct))
        return jax.tree.map(np.asarray, with_gradients(BY_NAME[name].meaning)(*wide, reset))


@pytest.mark.parametrize("method", ["gather", "scan", "ring"])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_across_is_the_exclusive_prefix(method, devices):
    rng = np.random.default_rng(devices)

    def draw(*shape):
        return rng.normal(size=(devices, *shape)).astype(np.float32)

    elements = {
        "decay": (DECAY, (-np.abs(draw(2)), draw(2, 3))),
        "softmax": (SOFTMAX, (10 * draw(2), np.abs(draw(2)), draw(2, 3))),
    }
    flags = rng.random((devices, 2)) < 0.3
    for monoid, element in elements.values():
        rule, whole = resettable(monoid), (jnp.asarray(flags), jax.tree.map(jnp.asarray, element))

        def local(x, rule=rule):
            one = jax.tree.map(lambda x: x[0], x)
            return jax.tree.map(lambda x: x[None], sequence.across(rule, one, "seq", method))

        with jax.set_mesh(mesh.make(f"seq={devices}")):
            spec = jax.P("seq")
            ours = jax.jit(sequence.manual(local, (spec,), spec))(whole)
        none = rule.identity(jax.tree.map(lambda x: x[0], whole))
        upto = scan(rule, whole, none)
        before = jax.tree.map(lambda n, x: jnp.concatenate([n[None], x[:-1]]), none, upto)
        close(ours[1], before[1], 1e-6)
        np.testing.assert_array_equal(ours[0], before[0])


@pytest.mark.parametrize("over", MESHES)
def test_prefixes_of_any_monoid_over_a_mesh(over):
    """With documents, one of which begins on a device's first token, and a state; and gradients."""
    rng = np.random.default_rng(8)
    batch, time, heads = 2, 16, 2
    reset = jnp.asarray(rng.random((batch, time)) < 0.1).at[1, 8].set(True)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    for monoid, element in (
        (DECAY, lambda *at: (-jnp.abs(draw(*at)), draw(*at, 3))),
        (SOFTMAX, lambda *at: (draw(*at), 1 + jnp.abs(draw(*at)), draw(*at, 3))),
    ):
        x, state = element(batch, time, heads), element(batch, heads)

        def both(x, state, monoid=monoid):
            y, pull = jax.vjp(lambda x, s: ops.prefixes(monoid, x, state=s, reset=reset), x, state)
            return y, pull(y)

        alone = jax.jit(both)(x, state)
        with jax.set_mesh(mesh.make(over)):
            close(jax.jit(both)(x, state), alone, 1e-5)
        one = jax.tree.map(lambda x: x[:, :1], x)
        with jax.set_mesh(mesh.make(over)):
            found = jax.jit(lambda x, s, m=monoid: ops.prefixes(m, x, state=s))(one, state)
        close(found, ops.prefixes(monoid, one, state=state), 1e-6)
