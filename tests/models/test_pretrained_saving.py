"""What save_pretrained refuses, and that nothing half written stays."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from scanax.models import LM, LMConfig
from scanax.models.pretrained import (
    FAMILIES,
    UncheckedWarning,
    load_pretrained,
    save_pretrained,
    weights,
)
from scanax.sharding import mesh
from support import stored
from support.compare import close
from support.parity import CASES
from support.stored import INDEX, SINGLE, quietly, same


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = stored.write(tmp_path_factory.mktemp("base") / "plain")
    stored.configure(folder, bos_token_id=7)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "vocab").mkdir()  # a folder of that name is no vocabulary
    return folder


@pytest.fixture
def model(base):
    return quietly(base)


def save(model, *args, **options):
    save_pretrained(model, *args, **{"family": "llama"} | options)


def test_what_is_there_stays(model, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for name in ("file", "full", "."):
        with pytest.raises(FileExistsError, match="exists and is not empty; choose another"):
            save(model, tmp_path / name)
    assert (tmp_path / "file").read_text() == "a file"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]


@pytest.mark.parametrize("at", ["new", "empty", "link", "deep/er/still", "empty/../new", "."])
def test_places(model, tmp_path, monkeypatch, at):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "new.new").mkdir()
    if at == ".":
        monkeypatch.chdir(tmp_path / "empty")
    save(model, at if at == "." else tmp_path / at)
    assert same(load_pretrained(tmp_path / ("empty" if at == "." else at)), model)
    assert (tmp_path / "new.new").is_dir()  # somebody else's
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gpt2", "family='gpt2' is not one of llama, "),
        ("mixtral", "no layout has words for this model: mixtral would be .*, not "),
        ("qwen2_moe", "no layout has words for this model: qwen2_moe would be "),
    ],
)
def test_a_wrong_family(model, tmp_path, family, says):
    with pytest.raises(ValueError, match=says) as caught:
        save(model, tmp_path / "out", family=family)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["attention+gelu", "attention+swiglu,aaren"])
def test_a_model_of_no_family(tmp_path, pattern):
    config = LMConfig(vocab=20, width=16, depth=2, pattern=pattern, norm="layer")
    with pytest.raises(ValueError, match="no layout has words for this model") as caught:
        save_pretrained(LM(config, rngs=nnx.Rngs(0)), tmp_path / "out")
    assert all(kind in str(caught.value) for kind in FAMILIES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_write_leaves_nothing(model, tmp_path, monkeypatch, error, after):
    calls, write = [], weights.save_file

    def save_file(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise error
        write(*args, **options)

    monkeypatch.setattr(weights, "save_file", save_file)
    with pytest.raises(type(error)):
        save(model, tmp_path / "out", most=3000)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save(model, tmp_path / "out", most=3000)
    assert same(load_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_written(model, tmp_path, value):
    """They would be refused when read."""
    model.norm.scale[...] = model.norm.scale[...].at[3].set(value)
    with pytest.raises(ValueError, match=r"numbers are not finite: model\.norm\.weight"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_like(base, model, tmp_path):
    save_pretrained(model, tmp_path / "out", like=base)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", SINGLE, "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 7
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        save_pretrained(model, tmp_path / "more", like=tmp_path / "nowhere")


@pytest.mark.parametrize("most", [0, 1, 3000, 10**9])
def test_files_are_of_the_size_asked_for(model, tmp_path, most):
    save(model, tmp_path / "out", most=most)
    files, largest = sorted((tmp_path / "out").glob("*.safetensors")), 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= most or len(sizes) == 1
        largest = max(largest, *sizes)
    assert (len(files) == 1) == (most == 10**9) == (not (tmp_path / "out" / INDEX).exists())
    assert same(load_pretrained(tmp_path / "out"), model)


def test_bfloat16(base, model, tmp_path):
    """Kept as it is, and the same function when read in the same dtype."""
    with pytest.warns(UserWarning, match="no checksums"):
        narrow = load_pretrained(base, dtype="bfloat16")
    save(narrow, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(load_pretrained(tmp_path / "out", dtype=jnp.bfloat16), narrow)
    wide = load_pretrained(tmp_path / "out")
    assert wide.config == dataclasses.replace(model.config, dtype="float32", param_dtype="float32")


MEASURED = """
import resource, sys, warnings
import jax, jax.numpy as jnp
import scanax
from scanax.models import pretrained
warnings.simplefilter("ignore")

def peak():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most

jax.block_until_ready(jnp.zeros(3) + 1)
pretrained.load_pretrained(sys.argv[1])  # small: what is compiled and imported
before = peak()
model = pretrained.load_pretrained(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize("shards", [1, 3])
def test_memory(base, tmp_path, shards):
    """A model never stands twice in the host's memory while it is read, pages of files included."""
    shape = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1400}
    config = stored.CONFIG | shape | {"num_hidden_layers": 6, "head_dim": 128}
    folder = stored.write(tmp_path / "large", shards, config)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    run = [sys.executable, "-c", MEASURED, str(base), str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    print(f"{int(done.stdout) / size:.2f} times {size / 2**20:.0f} MiB")
    assert int(done.stdout) < 1.8 * size


# Meshes


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request, tmp_path_factory):
    """(dtype, tokens, logits, the export) of a stored case on one device."""
    dtype, folder = request.param, tmp_path_factory.mktemp("alone") / "ours"
    with pytest.warns(UncheckedWarning):
        loaded = load_pretrained(CASES / "llama", dtype=dtype)
    save_pretrained(loaded, folder)
    tokens = jnp.asarray(np.load(CASES / "llama" / "inputs.npz")["input_ids"][:, :36], jnp.int32)
    return dtype, tokens, jitted(loaded, tokens), folder


@nnx.jit
def jitted(model, tokens):
    return model(tokens)[0]


@pytest.mark.parametrize("over", ["tensor=2", "fsdp=2", "pipe=2", "seq=3"])
def test_a_mesh(alone, tmp_path, over):
    """Its vocabulary of 97 is cut too."""
    dtype, tokens, logits, folder = alone
    made = mesh.make(over)
    loaded = load_pretrained(folder, dtype=dtype, mesh=made)
    with jax.set_mesh(made):
        close(jitted(loaded, tokens), logits, 3e-6 if dtype == "float32" else 2e-2)
    save_pretrained(loaded, tmp_path / "ours")
    exported, before = (load_file(at / SINGLE) for at in (tmp_path / "ours", folder))
    assert exported.keys() == before.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(exported[name], x)
