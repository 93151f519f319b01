"""Generating and evaluating on a mesh is doing it on one device: tokens, states, figures."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from scanax.experiments import evaluate, generate, metrics, saved_state, train
from scanax.experiments.datasets.text import DataConfig
from scanax.experiments.loading import load
from scanax.experiments.sampling import Choice, Generator
from scanax.layers.attention import AttentionConfig
from scanax.layers.gla import GLAConfig
from scanax.layers.mamba import MambaConfig
from scanax.models import LM
from scanax.sharding import hlo, mesh
from support import untrained
from support.compare import close
from support.runs import args

GREEDY, DRAWN = Choice(0.0), Choice(0.9, 40, 0.95)
N, ROOM, CHUNK = 5, 21, 3
PROMPTS = [np.arange(1, 8), np.array([9, 8]), np.array([3, 250, 3, 7]), np.array([77])]
MESHES = ("data=2,seq=2,tensor=2", "seq=4", "tensor=4")

ENDLESS = dataclasses.replace(
    untrained.SMALL,
    depth=3,
    pattern="gla+swiglu,mamba,attention+gelu",
    gla=GLAConfig(heads=4, conv=3, init_std=0.2),
    mamba=MambaConfig(state=4),
    attention=AttentionConfig(heads=4, kv_heads=2, init_std=0.2),
)
WINDOW = dataclasses.replace(
    ENDLESS, attention=AttentionConfig(heads=4, kv_heads=2, window=5, init_std=0.2)
)
MODELS = {"endless": ENDLESS, "window": WINDOW}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("def add(first, second):\n    return first + second\n" * 5)
    data = DataConfig(paths=(str(text),))
    return {name: untrained.save(folder / name, m, data) for name, m in MODELS.items()}


@pytest.fixture(scope="module")
def generators(runs):
    """By model and mesh, made once: their functions compile once."""
    made = {}

    def get(name, over=""):
        if (name, over) not in made:
            placed = mesh.make(over)
            loaded = load(runs[name], over=placed)
            made[name, over] = loaded, Generator(loaded.model, placed)
        return made[name, over]

    return get


def everything(generator):
    """Logits after the prompts and after more text, and tokens drawn both ways."""
    found = {}
    for how in (GREEDY, DRAWN):
        context = generator.start(PROMPTS, ROOM, 5, CHUNK)
        found["prompt"] = np.asarray(context.logits)
        tokens, context = generator.generate(context, N, how)
        more = np.tile(np.array([[7, 3, 5, 9, 2]], np.int32), (len(PROMPTS), 1))
        context = generator.go_on(context, more, CHUNK)
        found[how, "more"] = np.asarray(context.logits)
        again, _ = generator.generate(context, N, how)
        found[how, "tokens"] = np.concatenate([tokens, again], 1)
    return found


@pytest.fixture(scope="module")
def alone(generators):
    return {name: everything(generators(name)[1]) for name in MODELS}


@pytest.mark.parametrize("over", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_one_device(name, over, generators, alone):
    _, generator = generators(name, over)
    found = everything(generator)
    for what, expected in alone[name].items():
        if what[1] == "tokens":
            np.testing.assert_array_equal(found[what], expected)
        else:
            close(found[what], expected, 1e-5)
    # chunks, an even rest and single tokens; the loop once for each way to draw
    assert generator.feed._cache_size() <= 3 and generator.loop._cache_size() == 2


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_state_goes_on_on_another_mesh(name, generators, alone, tmp_path):
    """The sizes of its caches divide over seq=2 and seq=4 after rounding up, and differ."""
    path, before = str(tmp_path / "state"), generators(name, MESHES[0])
    for over in ("seq=4", "", "tensor=4", MESHES[0]):
        loaded, generator = before
        first, context = generator.generate(generator.start(PROMPTS, ROOM, 5, CHUNK), N, DRAWN)
        saved_state.save(path, context, loaded, used=7 + N, room=ROOM)
        before = loaded, generator = generators(name, over)
        context, used, room = saved_state.load(path, loaded, generator)
        assert (used, room) == (7 + N, ROOM)
        more = np.tile(np.array([[7, 3, 5, 9, 2]], np.int32), (len(PROMPTS), 1))
        again, _ = generator.generate(generator.go_on(context, more, CHUNK), N, DRAWN)
        expected = alone[name][DRAWN, "tokens"]
        np.testing.assert_array_equal(np.concatenate([first, again], 1), expected)


def test_a_step_moves_no_cache(generators):
    """Over seq a token costs one partial result an attention layer, whatever the cache holds."""
    calls = {}
    for room in (64, 1024):
        model = LM(
            dataclasses.replace(ENDLESS, pattern="attention+gelu*2,gla", depth=3), rngs=nnx.Rngs(0)
        )
        generator = Generator(model, mesh.make("seq=8"))
        context = jax.eval_shape(lambda g=generator, room=room: saved_state.empty(g, 2, room))
        context = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            context,
            generator.places,
        )
        compiled = generator.loop.lower(10, GREEDY, False, generator.variables, context).compile()
        calls[room] = hlo.count(compiled.as_text()).received
    layers, rows, heads, width, steps = 2, 2, 4, 16 // 4, 10
    partial = 4 * rows * heads * (width + 1)
    assert calls[64] == calls[1024] == {"all-gather": steps * layers * 7 * partial}


def test_every_device_has_its_part(generators):
    _, generator = generators("endless", MESHES[0])
    params, _ = generator.variables
    context = generator.start(PROMPTS, ROOM, 5, CHUNK)
    kernel = params["blocks"][0]["mlp"]["down"]["kernel"]
    assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // 2}
    ring = context.state[2]["k"]
    assert ring.shape == (4, 2, 22, 4)
    assert {s.data.shape for s in ring.addressable_shards} == {(2, 1, 11, 4)}
    S = context.state[0]["S"]
    assert S.shape == (4, 4, 2, 4)
    assert {s.data.shape for s in S.addressable_shards} == {(2, 2, 2, 4)}


@pytest.mark.parametrize("over", ["data=2,seq=2,tensor=2", "fsdp=4,seq=2"])
def test_figures_are_those_of_one_device(over, runs, tmp_path):
    """Of part of the text, by batches whose rows do not divide; and a line for what cannot be."""
    found = {}
    for flag in ("", over):
        out = str(tmp_path / flag)
        more = ["--lengths", "1", "3", "--tokens", "64", "--no-plot", "--mesh", flag]
        assert evaluate.main(["--checkpoint", str(runs["endless"]), "--out", out, *more]) == 0
        found[flag] = json.loads((tmp_path / flag / "evaluation.json").read_text())
    lengths = {flag: results.pop("lengths") for flag, results in found.items()}
    assert found[over] == found[""]
    assert lengths[""][1]["length"] == 24
    close(lengths[over], lengths[""], 1e-5)


def test_streaming_through_a_window_trains_as_on_one_device(texts, tmp_path):
    """The window does not divide over seq, and documents begin anywhere."""
    more = "--stream-state --model.pattern gla+swiglu,attention+gelu --model.attention.window 5 "
    losses = {}
    for over in ("", "data=2,seq=2"):
        folder = tmp_path / f"over {over}"
        words = [*args(texts, "RUN", more), "--steps", "6", "--no-plot", "--mesh", over]
        assert train.main([str(folder) if w == "RUN" else w for w in words]) == 0
        losses[over] = np.array([row["loss"] for row in metrics.read(folder)])
    close(losses["data=2,seq=2"], losses[""], 1e-5)


REFUSED = {
    "--mesh data=3": "prompts=2 does not divide over data=3 devices; 3 would",
    "--mesh seq=16": "mesh 'seq=16' has 16 devices, and there are 8",
    "--mesh tensor=8": "heads=4 does not divide over tensor=8 devices; 8 would",
    "--mesh stage=2": "'stage=2' is not AXIS=N",
    "--mesh pipe=2": "mesh pipe=2: only data, expert, fsdp, seq, tensor are used here",
    "--emulate-devices -1": "emulate_devices=-1; it must be at least 0",
    "--emulate-devices 9": "emulate_devices=9, but JAX already runs on 8 devices",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_wrong_mesh_is_one_line(flag, runs, capsys):
    common = ["--checkpoint", str(runs["window"]), *flag.split()]
    assert generate.main([*common, "--prompt", "a", "b"]) == 2
    assert re.fullmatch(rf"generate: .*{REFUSED[flag]}.*\n", capsys.readouterr().err)
    if "prompts" not in REFUSED[flag]:
        assert evaluate.main([*common, "--no-plot"]) == 2
        assert re.fullmatch(rf"evaluate: .*{REFUSED[flag]}.*\n", capsys.readouterr().err)


def test_lengths_that_do_not_divide_are_one_line(runs, capsys):
    common = ["--checkpoint", str(runs["window"]), "--no-plot", "--mesh", "seq=3"]
    assert evaluate.main([*common, "--lengths", "3", "1"]) == 2
    said = capsys.readouterr().err
    assert said == "evaluate: length=8 does not divide over seq=3 devices; 6 or 9 would\n"


def test_both_scripts_make_devices_of_a_cpu(runs, tmp_path, capsys):
    """A text that streams on four devices, and goes on on one."""
    bare = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    common = ["--checkpoint", str(runs["window"]), "--temperature", "0.7"]
    state = ["--save-state", str(tmp_path / "state")]
    words = [*common, "--prompt", "def a", "--tokens"]
    more = ["--mesh", "seq=2,tensor=2", "--emulate-devices", "4"]
    command = [sys.executable, generate.__file__, *words, "7", *state, *more]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert generate.main([*common, "--load-state", state[1], "--tokens", "8"]) == 0
    second = capsys.readouterr().out
    assert generate.main([*words, "15"]) == 0
    assert done.stdout[:-1] + second == capsys.readouterr().out
