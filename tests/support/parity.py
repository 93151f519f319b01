"""A language model of another code base beside ours: same weights, then every number it stored.

A case is a folder with config.json, model.safetensors, inputs, expected, grads and states (npz),
recorded in float32. `translate` maps a dict of its weights to our names by layer; it only splits,
transposes and renames, so it maps their gradients as well.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from scanax.layers.router import losses
from scanax.models import LM, LMConfig, by_layer, from_layers, merge, split
from support.compare import close

CASES = Path(__file__).parents[1] / "parity"
PREFILL = 21


def config_of(name: str) -> dict:
    return json.loads((CASES / name / "config.json").read_text())


ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}


def decoder(theirs: dict, layers: int, linear: dict[str, str] | None = None) -> dict:
    """What decoders of Llama's kind have in common by our names; `linear` has further kernels."""
    ours = {
        "embedding": theirs["model.embed_tokens.weight"],
        "norm.scale": theirs["model.norm.weight"],
        "head.kernel": theirs["lm_head.weight"].T,
    }
    names = {f"self_attn.{their}": f"mixer.{name}" for their, name in ATTENTION.items()}
    for i in range(layers):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        for their, name in (names | (linear or {})).items():
            ours[f"{to}{name}.kernel"] = theirs[f"{at}{their}.weight"].T
        for their, name in NORMS.items():
            ours[f"{to}{name}.scale"] = theirs[f"{at}{their}.weight"]
    return ours


def experts(theirs: dict, layers: int, count: int) -> dict:
    """Mixtures of experts by our names: expert by expert as on disk, or a layer's as in memory."""
    ours = {}
    for i in range(layers):
        at, to = f"model.layers.{i}.", f"layers.{i}.mlp."
        if f"{at}mlp.gate.weight" in theirs:
            router = theirs[f"{at}mlp.gate.weight"]
            gate, up = np.split(theirs[f"{at}mlp.experts.gate_up_proj"], 2, axis=1)
            down = theirs[f"{at}mlp.experts.down_proj"]
        else:
            moe = f"{at}block_sparse_moe."
            router = theirs[f"{moe}gate.weight"]
            gate, down, up = (
                np.stack([theirs[f"{moe}experts.{e}.{w}.weight"] for e in range(count)])
                for w in ("w1", "w2", "w3")
            )
        ours[f"{to}router.kernel"] = router.T
        for name, kernel in (("gate", gate), ("up", up), ("down", down.swapaxes(1, 2))):
            ours[f"{to}{name}"] = kernel.reshape(-1, kernel.shape[-1])
    return ours


def cache_of(theirs: dict, ours: dict, count: int) -> list:
    """Attention's keys and values beside those stored."""
    pairs = (("k", "keys"), ("v", "values"))
    return [(ours[k][:, :count], theirs[name].transpose(0, 2, 1, 3)) for k, name in pairs]


class Case:
    """Our model with the case's weights, its jitted calls, and the numbers to meet.

    `state_of(stored, ours, tokens)` pairs a layer's arrays of our state with those stored. `bar` is
    the largest error of values, `padded_bar` of those after left padding.
    """

    def __init__(
        self,
        name: str,
        config: LMConfig,
        translate: Callable[[dict], dict],
        state_of: Callable[[dict, dict, int], list],
        bar: float = 3e-6,
        padded_bar: float | None = None,
    ):
        self.state_of, self.bar, self.padded_bar = state_of, bar, padded_bar or bar
        folder = CASES / name
        self.expected, self.states = (
            np.load(folder / "expected.npz"),
            np.load(folder / "states.npz"),
        )
        inputs = np.load(folder / "inputs.npz")
        self.tokens = jnp.asarray(inputs["input_ids"], jnp.int32)
        labels = jnp.asarray(inputs["labels"][:, 1:], jnp.int32)
        self.config = config
        graphdef, params, rest = split(LM(config, rngs=nnx.Rngs(0)))
        weights = translate(load_file(folder / "model.safetensors"))
        shapes = {path: leaf.shape for path, leaf in by_layer(config, params).items()}
        assert shapes == {path: leaf.shape for path, leaf in weights.items()}
        self.params = from_layers(config, jax.tree.map(jnp.asarray, weights))
        self.grads = translate(dict(np.load(folder / "grads.npz")))

        def loss(params):
            model = merge(graphdef, params, rest)
            x, _, aux = model.hidden(self.tokens)
            added, _ = losses(config.moe.router, aux)  # of all tokens, the last as well
            nll, _, _ = model.nll(self.tokens[:, :-1], jnp.maximum(labels, 0))
            mean = jnp.sum(nll * (labels >= 0)) / jnp.sum(labels >= 0)
            return mean + added, model.logits(x)

        self.loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
        model = merge(graphdef, self.params, rest)
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


class Laws:
    """What every case has to meet; a file's class of tests inherits it beside a fixture `case`."""

    def test_logits_loss_and_gradients(self, case):
        (loss, logits), grads = case.loss(case.params)
        close(loss, case.expected["loss"], 1e-6)
        for name in ("logits", "logits_fp64"):
            close(logits, case.expected[name], case.bar)
        grads = by_layer(case.config, grads)
        assert grads.keys() == case.grads.keys()
        for name, grad in grads.items():
            close({name: grad}, {name: case.grads[name]}, 1e-5)

    def test_prefill_then_steps(self, case):
        logits, after, final = case.stream(jnp.zeros(case.tokens.shape, bool))
        close(logits, case.expected["logits_fp64"], case.bar)
        for when, state, count in (("prefill", after, PREFILL), ("final", final, 37)):
            stored = {
                name.removeprefix(f"{when}."): case.states[name]
                for name in case.states
                if name.startswith(f"{when}.")
            }
            for layer, ours in enumerate(state):
                prefix = f"l{layer}."
                one = {n.removeprefix(prefix): a for n, a in stored.items() if n.startswith(prefix)}
                for actual, desired in case.state_of(one, ours, count):
                    close(actual, desired, case.bar)

    def test_left_padding(self, case):
        """Row 0 begins at its sixth token; row 1 has no padding."""
        reset = jnp.zeros(case.tokens.shape, bool).at[0, 5].set(True).at[1, 0].set(True)
        logits, _, _ = case.stream(reset)
        expected = case.expected["logits_leftpad5_row0"]
        close(logits[0, 5:], expected[0, 5:], case.padded_bar)
        close(logits[1], expected[1], case.padded_bar)

    def test_greedy(self, case):
        expected = case.expected["greedy_cached"]
        ids = jnp.asarray(expected[:, :PREFILL], jnp.int32)
        new, state, reset = ids, case.empty, jnp.zeros(ids.shape, bool)
        while ids.shape[1] < expected.shape[1]:
            logits, state = case.step(new, state, reset)
            new, reset = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), reset[:, :1]
            ids = jnp.concatenate([ids, new], axis=1)
        np.testing.assert_array_equal(ids, expected)
