"""Damaged directories give one line that says what is wrong, or the right model; nothing runs."""

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scanax.models.pretrained import UncheckedWarning, load_pretrained, save_pretrained
from support import stored
from support.compare import close
from support.stored import INDEX, SINGLE, configure, copy, edit, quietly, refused, same

Q = "model.layers.1.self_attn.q_proj.weight"
SECOND = "model-00002-of-00002.safetensors"
TOKENS = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of one model by name: as others write it, and as save_pretrained does."""
    top = tmp_path_factory.mktemp("bases")
    found = {"plain": stored.write(top / "plain"), "sharded": stored.write(top / "sharded", 2)}
    model = quietly(found["plain"])
    for name, most in {"exported": 10**9, "exported shards": 3000}.items():
        save_pretrained(model, top / name, family="llama", most=most)
        found[name] = top / name
    return found


@pytest.fixture(scope="module")
def model(bases):
    return quietly(bases["plain"])


@pytest.fixture
def make(bases, tmp_path):
    return lambda name: copy(bases[name], tmp_path / "case")


@pytest.mark.parametrize("base", ["plain", "sharded"])
def test_without_checksums_it_warns(bases, model, base):
    with pytest.warns(UncheckedWarning, match="21 tensors have no checksums"):
        loaded = load_pretrained(bases[base])
    assert same(loaded, model)


def test_the_warning_is_about_the_line_that_loads(bases):
    """Where signatures are not checked, which puts calls between."""
    line = f"import scanax; scanax.load_pretrained({str(bases['plain'])!r})"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert "<string>:1: UncheckedWarning: " in done.stderr


@pytest.mark.parametrize("base", ["exported", "exported shards"])
def test_an_export_is_checked(bases, model, base):
    loaded = load_pretrained(bases[base])  # no warning, or it would be an error
    close(loaded(TOKENS)[0], model(TOKENS)[0], 0.0)
    assert same(loaded, model)


# Files that are cut short


@pytest.mark.parametrize("base", ["plain", "exported"])
@pytest.mark.parametrize("place", [0, 1, 7, 8, 9, 0.1, 0.3, 0.5, 0.7, 0.9, -64, -4, -1])
def test_truncated(make, base, place):
    folder = make(base)
    size = (folder / SINGLE).stat().st_size
    at = int(place * size) if isinstance(place, float) else place % size
    os.truncate(folder / SINGLE, at)
    refused(folder, f"{SINGLE} is no safetensors file")


@pytest.mark.parametrize("file", ["config.json", INDEX, SECOND])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_truncated_beside_others(make, file, part):
    folder = make("sharded")
    os.truncate(folder / file, int(part * ((folder / file).stat().st_size - 1)))
    refused(folder, f"{file} is no")


def test_longer_than_its_header_says(make):
    folder = make("plain")
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0" * 64)
    refused(folder, "no safetensors file")


# Single bits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("base", ["plain", "sharded", "exported", "exported shards"])
def test_flipped_bits(make, model, base, seed):
    """In every file: with checksums the model is the same or refused; without, there is a warning,
    and it cannot be seen whether numbers changed."""
    folder, rng = make(base), np.random.default_rng([seed, len(base)])
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith("tokenizer")):
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little") if path.suffix == ".safetensors" else 0
        places = [*rng.integers(len(good), size=6), *rng.integers(max(header, 8), size=6)]
        for place, bit in zip(places, rng.integers(8, size=len(places)), strict=True):
            data = bytearray(good)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                try:
                    loaded = load_pretrained(folder)
                except ValueError as error:
                    assert str(error).isprintable(), (path, place, bit)
                    continue
            warned = base in ("plain", "sharded") and heard[0].category is UncheckedWarning
            assert warned or same(loaded, model), (path, place, bit)
        path.write_bytes(good)


@pytest.mark.parametrize("base", ["exported", "exported shards"])
@pytest.mark.parametrize("option", ["rms_norm_eps", "rope_parameters", "num_attention_heads"])
def test_options_of_an_export_that_were_changed(make, base, option):
    other = {
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10001.0},
        "num_attention_heads": 2,
    }
    folder = make(base)
    configure(folder, **{option: other[option]})
    refused(folder, f"config.json: {option}=.* when the weights were written")


def test_numbers_of_an_export_that_were_changed(make):
    folder = make("exported")
    data = bytearray((folder / SINGLE).read_bytes())
    data[-2] ^= 1
    (folder / SINGLE).write_bytes(data)
    refused(folder, "was changed: its checksum differs")


# Tensors


def swap(held, name, other):
    held[other] = held.pop(name)


def scale(held, dtype, factor):
    held[Q] = (held[Q].astype(dtype)) * dtype(factor)


TENSORS = {
    "missing": (lambda h: h.pop(Q), f"missing tensors: {Q}"),
    "several missing": (lambda h: [h.pop(n) for n in list(h)[:12]], "missing.* and 4 more"),
    "none": (lambda h: h.clear(), "holds no tensors"),
    "renamed": (lambda h: swap(h, Q, "model.q"), f"missing tensors: {Q}"),
    "left over": (lambda h: h.update(extra=np.zeros(3, np.float32)), "left over: extra"),
    "a layer too many": (
        lambda h: h.update({Q.replace("1", "2"): h[Q]}),
        "left over: .*layers.2.self_attn.q_proj",
    ),
    "a name in lines": (
        lambda h: h.update({"two\nlines\x1b[1m": np.zeros(3, np.float32)}),
        r"left over: .*two\\nlines",
    ),
    "a long name": (lambda h: h.update({"x" * 9000: h[Q]}), "left over: xxx"),
    "rows missing": (lambda h: h.update({Q: h[Q][1:]}), rf"{Q} has \(15, 16\), not \(16, 16\)"),
    "flat": (lambda h: h.update({Q: h[Q].ravel()}), r"has \(256,\), not \(16, 16\)"),
    "an axis more": (lambda h: h.update({Q: h[Q][None]}), r"has \(1, 16, 16\)"),
    "a scalar": (lambda h: h.update({Q: np.float32(1)[None].reshape(())}), r"has \(\)"),
    "empty": (lambda h: h.update({Q: h[Q][:0]}), r"has \(0, 16\)"),
    "transposed": (
        lambda h: h.update({"lm_head.weight": h["lm_head.weight"].T.copy()}),
        r"lm_head.weight has \(16, 20\)",
    ),
    "nan": (lambda h: h[Q].__setitem__((3, 4), np.nan), f"{Q} holds numbers not finite"),
    "infinite": (lambda h: h["model.norm.weight"].__setitem__(0, np.inf), "not finite"),
    "minus infinity": (lambda h: h["lm_head.weight"].__setitem__((0, 0), -np.inf), "not finite"),
    "float64 beyond float32": (lambda h: scale(h, np.float64, 1e300), "not finite in float32"),
    "int8": (lambda h: h.update({Q: h[Q].astype(np.int8)}), "is of I8; read are BF16, F16"),
    "int64": (lambda h: h.update({Q: h[Q].astype(np.int64)}), "is of I64"),
    "bool": (lambda h: h.update({Q: h[Q] > 0}), "is of BOOL"),
    "float8": (lambda h: h.update({Q: h[Q].astype(ml_dtypes.float8_e4m3fn)}), "is of F8_E4M3"),
    "complex": (lambda h: h.update({Q: h[Q].astype(np.complex64)}), "is of C64"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(make, name):
    change, says = TENSORS[name]
    folder = make("plain")
    edit(folder, change)
    refused(folder, says)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_read(make, model, dtype):
    folder = make("plain")
    edit(folder, lambda held: held.update({n: x.astype(dtype) for n, x in held.items()}))
    close(quietly(folder)(TOKENS)[0], model(TOKENS)[0], 0.1)


def raw(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "not JSON": b"{]",
    "not UTF-8": b'{"\xff": 1}',
    "a list": [ONE],
    "deep": b"[" * 50_000,
    "deep in a name": b'{"a":' * 50_000,
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "offsets beyond": {"a": ONE | {"data_offsets": [0, 1600]}},
    "offsets backwards": {"a": ONE | {"data_offsets": [16, 0]}},
    "offsets negative": {"a": ONE | {"data_offsets": [-16, 0]}},
    "offsets overlap": {"a": ONE, "b": ONE},
    "a gap": {"a": ONE | {"shape": [3], "data_offsets": [4, 16]}},
    "more than 64 bits": {"a": ONE | {"shape": [2**63, 2**63]}},
    "a shape that overflows": {"a": ONE | {"shape": [2**62, 4], "data_offsets": [0, 0]}},
    "a negative shape": {"a": ONE | {"shape": [-4]}},
    "an unknown dtype": {"a": ONE | {"dtype": "F31"}},
    "metadata of numbers": {"a": ONE, "__metadata__": {"format": 1}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(make, name):
    folder = make("plain")
    raw(folder, HEADERS[name], b"\0" * 16)
    refused(folder, "no safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, 0])
def test_lengths_of_headers(make, length):
    folder = make("plain")
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(folder, "no safetensors file")


@pytest.mark.parametrize("about", ['{"a": 1}', "[]", "3", "{", "[" * 90_000, '{"a": "x"}'])
@pytest.mark.parametrize("name", ["crc32", "config"])
def test_metadata(make, about, name):
    folder = make("plain")
    save_file(load_file(folder / SINGLE), folder / SINGLE, metadata={name: about})
    refused(folder, "checksums|metadata were changed|when the weights were written")


# Shards and their index


def listed(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../plain/model.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "..",
        "a/b.safetensors",
        "a\\b.safetensors",
        "x\n.safetensors",
        "https://example.org/x.safetensors",
        "pytorch_model.bin",
        "",
        None,
        7,
        ["model.safetensors"],
        {},
    ],
)
def test_an_index_names_files_beside_it_only(make, file):
    folder = make("sharded")
    listed(folder, lambda where: where.update({Q: file}))
    refused(folder, f"{Q} is in .*, no safetensors file here")


SHARDS = {
    "no shard": (lambda f: (f / SECOND).unlink(), f"has no {SECOND}"),
    "a shard is a folder": (lambda f: [(f / SECOND).unlink(), (f / SECOND).mkdir()], "has no"),
    "a shard is a loop": (
        lambda f: [(f / SECOND).unlink(), (f / SECOND).symlink_to(SECOND)],
        f"has no {SECOND}",
    ),
    "a name less": (lambda f: listed(f, lambda w: w.pop(Q)), f"does not name {Q}"),
    "a name more": (lambda f: listed(f, lambda w: w.update(more=SECOND)), "names more, not in"),
    "a tensor twice": (
        lambda f: edit(f, lambda h: h.update(load_file(f / SECOND)), SECOND.replace("2", "1", 1)),
        "is in two files",
    ),
    "no names": (lambda f: configure(f, INDEX, weight_map={}), "has no weight_map"),
    "a list of names": (lambda f: configure(f, INDEX, weight_map=[Q]), "has no weight_map"),
    "no map": (lambda f: configure(f, INDEX, weight_map=None), "has no weight_map"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "is not a mapping"),
    "a name twice": (
        lambda f: (f / INDEX).write_text((f / INDEX).read_text().replace("layers.1", "layers.0")),
        "there twice",
    ),
    "one file as well": (
        lambda f: save_file({"a": np.zeros(1)}, f / SINGLE),
        f"has {SINGLE} and an {INDEX}",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), f"neither {SINGLE} nor {INDEX}"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards(make, name):
    change, says = SHARDS[name]
    folder = make("sharded")
    change(folder)
    refused(folder, says)


# What would run code


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def pickled(folder, name, protocol, zipped):
    data = pickle.dumps({"weight": Payload(folder / "ran")}, protocol)
    (folder / SINGLE).unlink(missing_ok=True)
    if not zipped:
        (folder / name).write_bytes(data)
        return
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr("archive/data.pkl", data)


@pytest.mark.parametrize("zipped", [False, True], ids=["bare", "zip"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_not_opened(make, name, protocol, zipped):
    folder = make("plain")
    pickled(folder, name, protocol, zipped)
    says = "no safetensors file" if protocol == 0 and not zipped else "pickled.*how to convert"
    refused(folder, says if name == SINGLE else f"{name}, which is pickled")
    assert not (folder / "ran").exists()


def test_code_beside_the_weights_is_not_run(make, model):
    folder = make("plain")
    code = f"open({str(folder / 'ran')!r}, 'w')\n"
    for name in ("modeling_llama.py", "configuration_llama.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Llama"})
    assert same(quietly(folder), model)
    pickled(folder, "pytorch_model.bin", 2, False)
    refused(folder, "pytorch_model.bin, which is pickled")
    assert not (folder / "ran").exists()
