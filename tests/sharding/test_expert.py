"""Experts over devices are the dense computation: every expert on every token, masked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.kernels import grouped_matmul
from scanax.sharding import exchange, expert, hlo, mesh, schedule
from scanax.sharding.expert_cost import Machine, Work, cost
from scanax.sharding.schedule import PLAIN, Schedule
from support.compare import close

B, T, D, F = 8, 12, 8, 16
FLAT = dataclasses.replace(PLAIN, expert_ladder=())
# experts, choices, mesh, schedule; every setting of one schedule stands beside several others
CASES = (
    (4, 1, "", PLAIN),
    (2, 2, "expert=8", Schedule(expert_degree=2, expert_slices=3)),
    (4, 2, "expert=8", Schedule(expert_degree=0)),
    (4, 2, "expert=8", Schedule(expert_degree=1, expert_slices=2)),
    (4, 1, "expert=8", Schedule(expert_degree=2, expert_slices=4, expert_node=4)),
    (4, 2, "expert=4,tensor=2", Schedule(expert_degree=1, expert_node=2)),
    (4, 2, "expert=2,fsdp=2,seq=2", Schedule(expert_slices=8)),
    (8, 2, "expert=8", PLAIN),
    (8, 1, "expert=2,seq=2,tensor=2", Schedule(matmul="ring", expert_slices=2)),
    (8, 2, "tensor=8", Schedule(expert_degree=0)),
    (64, 2, "expert=8", Schedule(expert_slices=2, expert_node=2, expert_ladder=(1.0, 4.0))),
    (64, 1, "data=2,expert=2,tensor=2", PLAIN),
    (64, 2, "fsdp=2,expert=4", Schedule(expert_degree=0)),
)


def act(x):
    return jnp.tanh(x)


def compute(x, sizes, kernels):
    h = act(grouped_matmul(x, kernels["up"], sizes, transpose=True))
    return grouped_matmul(h, kernels["down"], sizes)


def dense(x, chosen, weights, kernels, experts):
    up, down = (kernels[name].reshape(experts, -1, x.shape[-1]) for name in ("up", "down"))
    y = act(jnp.einsum("btd,efd->btef", x, up, precision="highest"))
    y = jnp.einsum("btef,efd->bted", y, down, precision="highest")
    each = (jax.nn.one_hot(chosen, experts, dtype=x.dtype) * weights[..., None]).sum(2)
    return jnp.einsum("bted,bte->btd", y, each, precision="highest")


def both(function):
    """(y, gradients of x, weights and kernels) of sum(y ct)."""

    def loss(x, weights, kernels, chosen, ct):
        y = function(x, chosen, weights, kernels)
        return (y * ct).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def data(experts, k, skew, length=T):
    """Tokens, weights, kernels, choices by skew, a cotangent."""
    rng = np.random.default_rng(0)
    x, ct = rng.normal(size=(2, B, length, D)).astype(np.float32)
    weights = rng.random((B, length, k)).astype(np.float32)
    scores = rng.random((B, length, experts))
    if skew == "all to one":
        scores[..., -1] = 2
    if skew == "one has none":
        scores[..., 0] = -1
    chosen = np.argsort(-scores, -1)[..., :k].astype(np.int32)
    if skew == "no expert":  # of some tokens
        chosen[rng.random((B, length)) < 0.3, -1] = experts
    kernels = rng.normal(size=(2, experts * F, D)).astype(np.float32)
    return x, weights, dict(zip(("up", "down"), kernels, strict=True)), chosen, ct


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_over_devices_are_the_dense_computation(case):
    experts, k, over, how = case
    true = both(lambda *a: dense(*a, experts))
    with jax.set_mesh(mesh.make(over)), schedule.using(how):
        ours = both(lambda *a: expert.run(compute, *a, experts)[0])
        for skew in ("even", "all to one", "one has none", "no expert"):
            inputs = data(experts, k, skew)
            (_, y), grads = ours(*inputs)
            (_, expected), expected_grads = true(*inputs)
            close(y, expected, 1e-5)
            close(grads, expected_grads, 1e-4)


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What JAX's documentation says of it, for XLA:CPU has none; nan where the sizes disagree."""
    everyone = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    sent, begins, sizes, places = map(
        everyone, (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(output), dtype=jnp.int32)
    for source in range(len(sizes)):
        from_there = row - places[source, me]
        taken = sent[source][jnp.clip(begins[source, me] + from_there, 0, len(operand) - 1)]
        here = (from_there >= 0) & (from_there < sizes[source, me])
        output = jnp.where(here[:, None], taken, output)
        output = jnp.where(sizes[source, me] == recv_sizes[source], output, jnp.nan)
    return output


SENT = [case for case in CASES if case[1] == 2 and "expert" in case[2] and case[3].expert_degree]


@pytest.mark.parametrize("case", SENT, ids=str)
def test_only_the_rows_that_there_are_may_travel(case, monkeypatch):
    """By ragged all-to-all, as on GPUs and TPUs, all is the same but by nodes, which pads."""
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return ragged_all_to_all(*args, **options)

    monkeypatch.setattr(exchange, "RAGGED", ("cpu",))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", counted)
    test_experts_over_devices_are_the_dense_computation(case)
    assert bool(calls) == (case[3].expert_node == 1)


def test_the_load_says_how_much_room_there_is():
    """Rows that a device's experts get: of the least room that holds the load, or in rounds."""
    seen = []

    def heard(x, sizes, kernels):
        jax.debug.callback(lambda: seen.append(x.shape[0]))
        return compute(x, sizes, kernels)

    x, weights, kernels, _, _ = data(8, 1, "even")
    even = np.tile(np.arange(8, dtype=np.int32), B * T // 8).reshape(B, T, 1)
    half = np.where(even % 2 == 0, even, 0)
    how = Schedule(expert_ladder=(1.5, 3.0))  # of 12 tokens, 1.5 for each of 8 devices
    with jax.set_mesh(mesh.make("expert=8")), schedule.using(how):
        run = jax.jit(lambda *a: expert.run(heard, *a, 8)[0])
        for chosen, room, rounds in ((even, 3, 1), (half, 5, 2), (np.zeros_like(even), 5, 3)):
            seen.clear()
            y = run(x, chosen, weights, kernels)
            jax.effects_barrier()
            assert seen == [8 * room] * rounds * 8
            close(y, dense(x, chosen, weights, kernels, 8), 1e-5)


@pytest.mark.parametrize("length", [1, 7])
def test_tokens_that_do_not_divide_are_shared_out(length):
    inputs = data(8, 2, "even", length)
    with jax.set_mesh(mesh.make("expert=2,tensor=4")):
        result = both(lambda *a: expert.run(compute, *a, 8)[0])(*inputs)
    close(result, both(lambda *a: dense(*a, 8))(*inputs), 1e-4)


def test_a_capacity_is_of_each_device_and_what_it_drops_is_counted():
    experts, k = 4, 2
    x, weights, kernels, chosen, _ = data(experts, k, "even")
    for over, devices in (("", 1), ("expert=8", 8)):
        with jax.set_mesh(mesh.make(over)):
            run = jax.jit(lambda *a: expert.run(compute, *a, experts, capacity=0.5))
            y, dropped = run(x, chosen, weights, kernels)
        # a device's tokens: as many rows as it has, flat
        kept = np.zeros_like(chosen, bool)
        most = k * int(0.5 * -(-B * T // devices // experts))
        flat, marks = chosen.reshape(devices, -1, k), kept.reshape(devices, -1, k)
        for device in range(devices):
            count = np.zeros(experts, int)
            for j in range(k):
                for t, e in enumerate(flat[device, :, j]):
                    marks[device, t, j] = count[e] < most
                    count[e] += 1
        expected = dense(x, chosen, np.where(kept, weights, 0), kernels, experts)
        close(y, expected, 1e-5)
        close(dropped, 1 - kept.mean(), 1e-6)
        assert 0.2 < dropped < 0.8


@pytest.mark.parametrize("degree", [0, 1, 2, 4])
def test_bytes_are_those_of_the_formula(degree):
    """2 r S (W - 1) / W for tokens there and back, P (1 / r - 1 / G) for an expert's weights."""
    devices, experts, k = 8, 2, 1
    x, weights, kernels, chosen, _ = data(experts, k, "even")
    how = dataclasses.replace(FLAT, expert_degree=degree) if degree else Schedule(expert_degree=0)
    over = mesh.make("expert=8")
    with jax.set_mesh(over), schedule.using(how):
        rows = mesh.sharding(over, mesh.ROWS)
        placed = jax.device_put((x, chosen, weights), rows)
        kernels = jax.device_put(kernels, mesh.sharding(over, *expert.KERNEL))
        run = jax.jit(lambda *a: expert.run(compute, *a, experts)[0])
        text = run.lower(*placed, kernels).compile().as_text()
    received = hlo.count(text).received
    parts, P = devices // experts, 2 * F * D * 4
    bins = devices // degree if degree else 1
    room = -(-T // (parts // degree)) if degree else 0  # all its tokens may choose one expert
    work = Work(bins * room, D, F, matrices=2, itemsize=4)
    modelled = cost(expert.Layout(devices, experts, degree), work, Machine(1.0, 1.0, 0.0))
    if degree == 0:
        assert "all-to-all" not in received
        assert received["all-gather"] == P * experts * (devices - 1) / devices
        assert received["all-gather"] == modelled.gathered
        return
    S = bins * room * D * 4
    counts = devices * 4 * (devices - 1) / devices
    assert received["all-to-all"] == 2 * degree * S * (devices - 1) / devices + counts
    assert received.get("all-gather", 0) == P * (1 / degree - 1 / parts)
    assert received["all-to-all"] == modelled.sent + counts
    assert received.get("all-gather", 0) == modelled.gathered


@pytest.mark.parametrize(
    ("over", "how", "experts", "says"),
    [
        ("expert=8", PLAIN, 6, "experts=6 does not divide over expert=8 devices; 8 would"),
        ("expert=8", PLAIN, 12, "experts=12 does not divide over expert=8 devices; 8 or 16 would"),
        ("expert=8", Schedule(expert_degree=3), 2, "expert_degree=3: .* 4 slices; 0, 1, 2, 4"),
        ("expert=8", Schedule(expert_node=3), 8, "expert_node=3 does not divide 8 devices"),
    ],
)
def test_what_does_not_fit_is_said(over, how, experts, says):
    x, weights, kernels, chosen, _ = jax.tree.map(jnp.asarray, data(experts, 1, "even"))
    context = jax.set_mesh(mesh.make(over)), schedule.using(how)
    with context[0], context[1], pytest.raises(ValueError, match=says):
        expert.run(compute, x, chosen, weights, kernels, experts)
