"""ViR against an unofficial implementation, whose heads each read their own slice of the width.

Such heads are projections with kernels of blocks on the diagonal; gradients are compared there.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from scanax.layers import MLPConfig, VirConfig
from scanax.models import ResidualConfig, Vision, VisionConfig, by_layer, from_layers, merge, split
from scanax.models.vision import patches
from support.compare import close
from support.parity import CASES

pytestmark = pytest.mark.core

FOLDER = CASES / "vir_unofficial"
THEIRS = json.loads((FOLDER / "config.json").read_text())
WIDTH, HEADS, PATCH, DEPTH = (THEIRS[n] for n in ("embed_dim", "heads", "patch_size", "depth"))
SLICE, TOKENS = WIDTH // HEADS, (THEIRS["image"] // PATCH) ** 2
CONFIG = VisionConfig(
    image=(THEIRS["image"],) * 2,
    patch=PATCH,
    width=WIDTH,
    depth=DEPTH,
    norm_eps=1e-5,
    residual=ResidualConfig(),
    mlp=MLPConfig(hidden=4 * WIDTH, bias=True),
    vir=VirConfig(heads=HEADS, norm="layer", norm_eps=1e-5),
)


def ours(theirs):
    """Their arrays under our names; of a kernel of blocks, zero where they have nothing."""
    kernel = theirs["patch_embed.weight"].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    found = {
        "input.kernel": kernel,
        "input.bias": theirs["patch_embed.bias"],
        "position": theirs["pos_embed"][0, :TOKENS],
        "norm.scale": theirs["ln.weight"],
        "norm.bias": theirs["ln.bias"],
    }
    for layer in range(DEPTH):
        a, b = f"layers.{layer}", f"blocks.{layer}"
        for n in "qkv":
            found[f"{a}.mixer.{n}.kernel"] = np.zeros((WIDTH, WIDTH), np.float32)
            found[f"{a}.mixer.{n}.bias"] = np.zeros(WIDTH, np.float32)
        for head in range(HEADS):
            name, at = f"{b}.retention.heads.{head}.qkv", slice(head * SLICE, (head + 1) * SLICE)
            for i, n in enumerate("qkv"):
                rows = slice(i * SLICE, (i + 1) * SLICE)
                found[f"{a}.mixer.{n}.kernel"][at, at] = theirs[f"{name}.weight"][rows].T
                found[f"{a}.mixer.{n}.bias"][at] = theirs[f"{name}.bias"][rows]
        for mine, their in (("mixer.out", "retention.linear"), ("mlp.up", "mlp.linear1")):
            found |= linear(theirs, f"{a}.{mine}", f"{b}.{their}")
        found |= linear(theirs, f"{a}.mlp.down", f"{b}.mlp.linear2")
        norms = ("mixer_norm", "ln1"), ("mlp_norm", "ln2"), ("mixer.norm", "retention.ln")
        for mine, their in norms:
            found[f"{a}.{mine}.scale"] = theirs[f"{b}.{their}.weight"]
            found[f"{a}.{mine}.bias"] = theirs[f"{b}.{their}.bias"]
    return found


def linear(theirs, mine, their):
    return {
        f"{mine}.kernel": theirs[f"{their}.weight"].T,
        f"{mine}.bias": theirs[f"{their}.bias"],
    }


def test_outputs_and_gradients():
    """Of the patches after the last norm: the reference has neither class token nor output."""
    inputs, expected, grads = (
        dict(np.load(FOLDER / f"{part}.npz")) for part in ("inputs", "expected", "grads")
    )
    assert not grads["pos_embed"][0, TOKENS:].any()
    graphdef, drawn, rest = split(Vision(CONFIG, rngs=nnx.Rngs(0)))
    flat = by_layer(CONFIG, drawn)
    named = ours(load_file(FOLDER / "model.safetensors"))
    unused = {"class_token", "output.kernel", "output.bias"}
    assert flat.keys() - named.keys() == unused
    params = from_layers(CONFIG, flat | {k: jnp.asarray(v) for k, v in named.items()}, Vision)
    x = patches(jnp.asarray(inputs["x_nchw"].transpose(0, 2, 3, 1)), PATCH)

    def loss(params):
        model = merge(graphdef, params, rest)
        y, _, _ = model.mix(model.embed(x))
        return jnp.sum(y * inputs["ct"]), y

    (_, y), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for form in ("y", "y_recurrent", "y_chunk"):
        close(y, expected[form], 3e-6)
    found, wanted = by_layer(CONFIG, found), ours(grads)
    blocks = np.kron(np.eye(HEADS), np.ones((SLICE, SLICE))) > 0
    for name, gradient in wanted.items():
        one = np.asarray(found[name])
        if name.split(".")[-2:] in ([n, "kernel"] for n in "qkv"):
            assert one[~blocks].any()  # where their kernels have nothing, ours are free to learn
            one = np.where(blocks, one, 0)
        close(one, gradient, 1e-5)
