"""Top-2 experts with and without a capacity, against Tutel's routing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scanax.kernels import grouped_matmul, routing
from scanax.sharding import expert
from support.compare import close
from support.parity import CASES

pytestmark = pytest.mark.core

NAMES = {
    "up": "experts.batched_fc1_w",
    "down": "experts.batched_fc2_w",
    "up_bias": "experts.batched_fc1_bias",
    "bias": "experts.batched_fc2_bias",
    "router": "gates.0.wg.weight",
}


def compute(x, sizes, kernels):
    up = grouped_matmul(x, kernels["up"], sizes, transpose=True)
    rows = jnp.repeat(kernels["up_bias"], sizes, axis=0, total_repeat_length=x.shape[0])
    return grouped_matmul(jax.nn.gelu(up + rows, approximate=False), kernels["down"], sizes)


@pytest.mark.parametrize("name", ["tutel_top2_cap1", "tutel_top2_dropless"])
@pytest.mark.parametrize("router", ["gshard", "softmax"])
def test_tutel(name, router):
    folder = CASES / name
    settings = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    weights = {ours: jnp.asarray(stored[theirs]) for ours, theirs in NAMES.items()}
    inputs, expected, grads = (
        dict(np.load(folder / f"{part}.npz")) for part in ("inputs", "expected", "grads")
    )
    experts, k = settings["experts"], settings["k"]

    def layer(x, weights):
        logits = jnp.einsum("btd,ed->bte", x, weights["router"], precision="highest")
        if router == "gshard":
            routed = routing.gshard(logits)
        else:
            routed = routing.softmax(logits, k, renormalize=True)
        flat = {n: a.reshape(-1, a.shape[-1]) for n, a in weights.items() if n in ("up", "down")}
        kernels = flat | {"up_bias": weights["up_bias"].reshape(-1)}
        y, dropped = expert.run(
            compute,
            x,
            routed.experts,
            routed.weights,
            kernels,
            experts,
            bias=weights["bias"],
            capacity=settings["capacity_factor"],
        )
        first = routing.load(routed.experts, experts, first=True)
        l_aux = routing.balance(first, routed.probabilities)
        return jnp.sum(y * inputs["ct"]) + l_aux, (y, l_aux, routed, dropped)

    run = jax.jit(jax.value_and_grad(layer, (0, 1), has_aux=True))
    (_, (y, l_aux, routed, dropped)), (at_x, ours) = run(jnp.asarray(inputs["x"]), weights)
    np.testing.assert_array_equal(routed.experts.reshape(-1, k), expected["topk_idx"])
    close(routed.weights.reshape(-1, k), expected["topk_w"], 3e-6)
    close((l_aux, y), (expected["l_aux"], expected["y"]), 3e-6)
    close(at_x, grads["x"], 1e-5)
    close(ours, {name: grads[theirs] for name, theirs in NAMES.items()}, 1e-5)
    close(dropped * 2 * 38, 6.0 if settings["capacity_factor"] else 0.0, 1e-6)
