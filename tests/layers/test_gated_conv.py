"""LFM2's mixer against its formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scanax.layers import GatedConv, GatedConvConfig
from support.compare import close


def test_the_formula():
    """out(gate(x) * sum_j kernel_j (z(x) v(x))_{t-j}), nothing before a document's first token."""
    model = GatedConv(6, GatedConvConfig(taps=4, init_std=0.5), rngs=nnx.Rngs(0))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model)))
    x = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    reset = np.zeros((2, 7), bool)
    reset[1, 3] = True
    v, z, gate = (x @ p[name]["kernel"] for name in ("v", "z", "gate"))
    want = np.zeros(x.shape)
    for b, t in np.ndindex(2, 7):
        for lag in range(4):
            if t - lag >= (3 if b == 1 and t >= 3 else 0):
                want[b, t] += p["conv"]["kernel"][3 - lag] * (z * v)[b, t - lag]
    y, state = model(jnp.asarray(x), reset=jnp.asarray(reset))
    close(y, (gate * want) @ p["out"]["kernel"], 1e-6)
    close(state["conv"], (z * v)[:, -3:], 1e-6)
    assert set(p) == {"v", "z", "gate", "conv", "out"} and not p["conv"].get("bias")
