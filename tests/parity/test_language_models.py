"""Published layouts: each stored case loads, and gives every number that its own code gave."""

import jax.numpy as jnp
import numpy as np
import pytest
from scanax.models import by_layer
from support.compare import close
from support.parity import (
    PADDING,
    PREFILL,
    Case,
    Recorded,
    cache,
    hybrid,
    recurrent,
    scanned,
    scanned2,
    unfused,
    values_first,
)

pytestmark = pytest.mark.core

RECORDED = {
    "fla_gla": Recorded(values_first, bar=5e-6),
    "fla_retnet": Recorded(recurrent, bar=5e-6, padded_bar=1e-5),
    "llama": Recorded(cache),
    "mamba": Recorded(scanned),
    "mamba2": Recorded(scanned2),
    "minimax": Recorded(hybrid, unfused),
    "mixtral": Recorded(cache, unfused),
    "transnormer": Recorded(recurrent),
}


@pytest.fixture(scope="module", params=RECORDED)
def case(request):
    return Case(request.param, RECORDED[request.param])


def test_logits_loss_and_gradients(case):
    (loss, (logits, added)), grads = case.loss(case.params)
    close(loss, case.expected["loss"], 1e-6)
    for recorded in (case.expected["logits"], case.exact()):
        close(logits, recorded, case.recorded.bar)
    if "aux_loss" in case.expected:
        k = case.config.moe.router.choices
        close(added, case.expected["aux_loss"] * case.config.moe.router.balance / k, 3e-6)
    grads = by_layer(case.config, grads)
    assert grads.keys() == case.grads.keys()
    for name, grad in grads.items():
        close({name: grad}, {name: case.grads[name]}, 1e-5)


def test_prefill_then_steps(case):
    logits, after, final = case.stream(jnp.zeros(case.tokens.shape, bool))
    close(logits, case.exact(), case.recorded.bar)
    for when, state, count in (("prefill", after, PREFILL), ("final", final, 37)):
        for layer, ours in enumerate(state):
            prefix = f"{when}.l{layer}."
            stored = {
                n.removeprefix(prefix): case.states[n] for n in case.states if n.startswith(prefix)
            }
            for actual, desired in case.recorded.state_of(stored, ours, count):
                close(actual, desired, case.recorded.bar)


def test_left_padding(case):
    """Row 0 begins at its sixth token; row 1 has no padding."""
    reset = jnp.zeros(case.tokens.shape, bool).at[0, PADDING].set(True).at[1, 0].set(True)
    logits, _, _ = case.stream(reset)
    bar = case.recorded.padded_bar or case.recorded.bar
    if "logits_leftpad5_row0" in case.expected:
        row = case.expected["logits_leftpad5_row0"][0, PADDING:]
    else:  # none was recorded: what the row gives alone stands for it
        tokens = jnp.roll(case.tokens, -PADDING, axis=1)
        row = case.step(tokens, case.empty, jnp.zeros(tokens.shape, bool))[0][0, :-PADDING]
    close(logits[0, PADDING:], row, bar)
    close(logits[1], case.expected["logits"][1], bar)


def test_greedy(case):
    """With a state, whether or not the reference had one."""
    expected = case.expected.get("greedy_cached", case.expected.get("greedy_full"))
    ids = jnp.asarray(expected[:, :PREFILL], jnp.int32)
    new, state, reset = ids, case.empty, jnp.zeros(ids.shape, bool)
    while ids.shape[1] < expected.shape[1]:
        logits, state = case.step(new, state, reset)
        new, reset = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), reset[:, :1]
        ids = jnp.concatenate([ids, new], axis=1)
    np.testing.assert_array_equal(ids, expected)
