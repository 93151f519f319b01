"""A stored language model of another code base: loaded as published, then every number it stored.

A case is a folder with config.json, model.safetensors, inputs, expected, grads and states (npz),
recorded in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.layers.router import losses
from scanax.models import merge, split
from scanax.models.pretrained import Pretrained, UncheckedWarning, load_pretrained
from scanax.models.pretrained.pieces import by_name, to_ours

CASES = Path(__file__).parents[1] / "parity"
PREFILL, PADDING = 21, 5
Arrays = dict[str, np.ndarray]


class Recorded(NamedTuple):
    """How a case was recorded."""

    state_of: Callable[[Arrays, dict, int], list]
    """Pairs a layer's arrays of our state with those stored, after so many tokens."""
    on_disk: Callable[[Arrays], Arrays] = dict
    """Gradients, stored by the names of the reference's memory, by those of its files."""
    bar: float = 3e-6
    """The largest error of values."""
    padded_bar: float | None = None
    """That of values after left padding, where it is another one."""


class Case:
    """Our model of a case, its jitted calls, and the numbers to meet."""

    def __init__(self, name: str, recorded: Recorded):
        self.recorded, folder = recorded, CASES / name
        inputs = np.load(folder / "inputs.npz")
        self.expected = dict(np.load(folder / "expected.npz"))
        self.states = np.load(folder / "states.npz")
        self.tokens = jnp.asarray(inputs["input_ids"], jnp.int32)
        labels = jnp.asarray(inputs["labels"][:, 1:], jnp.int32)
        with pytest.warns(UncheckedWarning):
            model = load_pretrained(folder)
        self.config = config = model.config
        graphdef, self.params, rest = split(model)
        theirs = recorded.on_disk(dict(np.load(folder / "grads.npz")))
        pieces = by_name(Pretrained(folder).pieces, "ours")
        self.grads = {
            n: to_ours(each, lambda t, rows: theirs[t][rows]) for n, each in pieces.items()
        }

        def loss(params):
            model = merge(graphdef, params, rest)
            x, _, aux = model.hidden(self.tokens)
            added, _ = losses(config.moe.router, aux)  # of all tokens, the last as well
            nll, _, _ = model.nll(self.tokens[:, :-1], jnp.maximum(labels, 0))
            mean = jnp.sum(nll * (labels >= 0)) / jnp.sum(labels >= 0)
            return mean + added, (model.logits(x), added)

        self.loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
        self.empty = model.init_state(2, 48)
        step = jax.jit(
            lambda p, tokens, state, reset: merge(graphdef, p, rest)(tokens, state, reset)
        )
        self.step = lambda tokens, state, reset: step(self.params, tokens, state, reset)

    def stream(self, reset):
        """Logits of a prefill and steps, and the states after the prefill and at the end."""
        tokens = self.tokens
        logits, state = self.step(tokens[:, :PREFILL], self.empty, reset[:, :PREFILL])
        outputs, after = [logits], state
        for t in range(PREFILL, tokens.shape[1]):
            logits, state = self.step(tokens[:, t : t + 1], state, reset[:, t : t + 1])
            outputs.append(logits)
        return jnp.concatenate(outputs, axis=1), after, state

    def exact(self):
        """The best logits that were recorded: those computed in float64, where there are any."""
        return self.expected.get("logits_fp64", self.expected["logits"])


def cache(stored: Arrays, ours: dict, count: int) -> list:
    """Attention's keys and values."""
    pairs = (("k", "keys"), ("v", "values"))
    return [(ours[k][:, :, :count], stored[name]) for k, name in pairs]


def recurrent(stored: Arrays, ours: dict, count: int) -> list:
    """A state (B, H, K, V), the only one."""
    (S,) = stored.values()
    return [(ours["S"], S)]


def values_first(stored: Arrays, ours: dict, count: int) -> list:
    """A state (B, H, V, K), the only one."""
    (S,) = stored.values()
    return [(ours["S"], S.swapaxes(2, 3))]


def hybrid(stored: Arrays, ours: dict, count: int) -> list:
    return (cache if "keys" in stored else recurrent)(stored, ours, count)


def scanned(stored: Arrays, ours: dict, count: int) -> list:
    """Mamba: of the last 4 inputs of its convolution that it keeps, the next token needs 3."""
    window = stored["conv_states.0"].transpose(0, 2, 1)[:, 1:]
    return [(ours["conv"], window), (ours["S"], stored["recurrent_states.0"])]


def scanned2(stored: Arrays, ours: dict, count: int) -> list:
    """Mamba-2: one convolution for x, B and C."""
    window = stored["conv_states.0"].transpose(0, 2, 1)[:, 1:]
    windows = np.concatenate([ours[f"{role}_conv"] for role in "xBC"], axis=2)
    return [(windows, window), (ours["S"], stored["recurrent_states.0"].swapaxes(2, 3))]


def unfused(theirs: Arrays) -> Arrays:
    """Experts that lie in one array in memory, as the files have them: one by one."""
    found = {}
    for name, x in theirs.items():
        at, _, rest = name.partition(".mlp.")
        experts = f"{at}.block_sparse_moe.experts"
        if rest == "gate.weight":
            found[f"{at}.block_sparse_moe.gate.weight"] = x
        elif rest == "experts.gate_up_proj":
            for e, both in enumerate(x):
                halves = zip(("w1", "w3"), np.split(both, 2), strict=True)
                found |= {f"{experts}.{e}.{w}.weight": half for w, half in halves}
        elif rest == "experts.down_proj":
            found |= {f"{experts}.{e}.w2.weight": one for e, one in enumerate(x)}
        else:
            found[name] = x
    return found
