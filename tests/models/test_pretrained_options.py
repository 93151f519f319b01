"""What stands in config.json is understood or refused, wherever the directory is."""

import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest
from scanax.models.pretrained import load_pretrained
from support import stored
from support.stored import SINGLE, configure, copy, quietly, refused, same


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stored.write(tmp_path_factory.mktemp("base") / "plain")


@pytest.fixture
def folder(base, tmp_path):
    return copy(base, tmp_path / "case")


TEXTS = {
    "empty": b"",
    "no JSON": b"model_type: llama",
    "a list": b"[1, 2]",
    "a text": b'"llama"',
    "null": b"null",
    "no end": b'{"model_type": "llama"',
    "deep": b'{"a": ' + b"[" * 200_000,
    "not UTF-8": b'{"model_type": "ll\xffma"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "zeros": b"\0" * 500,
    "thousands of digits": b'{"vocab_size": 1' + b"0" * 9000 + b"}",
    "twice": b'{"model_type": "llama", "model_type": "mistral"}',
    "twice inside": b'{"rope_parameters": {"rope_theta": 1, "rope_theta": 2}}',
    "a safetensors file": (40).to_bytes(8, "little") + b'{"__metadata__": {"format": "pt"}}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(folder, name):
    (folder / "config.json").write_bytes(TEXTS[name])
    refused(folder, "config.json is not (JSON|a mapping)")


def test_a_file_too_large_to_be_options(folder):
    os.truncate(folder / "config.json", 2**33)  # of holes
    refused(folder, "config.json has more than")


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
SIZES += ("num_attention_heads", "num_key_value_heads")
NO_SIZES = (0, -1, -(2**62), 2**62, 10**9, 10**400, 1.5, "4", True, False, [4], {"a": 4})
NO_SIZES += (float("nan"), float("inf"), "")


@pytest.mark.parametrize("value", NO_SIZES, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(folder, name, value):
    configure(folder, **{name: value})
    refused(folder, f"config.json: {name}=.*not supported; it can be a ")


@pytest.mark.parametrize("value", [1, 3, 8, 17, 21, 320])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_the_files_do_not_have(folder, name, value):
    configure(folder, **{name: value})
    if stored.CONFIG[name] != value:
        refused(folder, "shape|missing|left over|divide|even|not supported")


@pytest.mark.parametrize("value", [-1e-6, -1, 10**400, "1e-6", True, [], float("nan"), -1e39, 1e39])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_numbers(folder, name, value):
    configure(folder, **{name: value})
    refused(folder, f"config.json: {name}=.*not supported; it can be a ")


OPTIONS = {
    "no kind": ({"model_type": None}, "model_type=null is not one of llama, "),
    "another kind": ({"model_type": "gpt2"}, 'model_type="gpt2" is not one of'),
    "a kind in lines": ({"model_type": "a\nb"}, r'model_type="a\\nb" is not'),
    "a kind that is a list": ({"model_type": ["llama"]}, "model_type=.* is not one of"),
    "a kind that is a mapping": ({"model_type": {}}, "model_type=.* is not one of"),
    "a long kind": ({"model_type": "x" * 10**6}, "model_type=.* is not one of"),
    "an option of nobody": ({"flux": 1}, "not supported for this kind of model: flux=1"),
    "a name in lines": ({"a\nb": 1}, r'kind of model: "a\\nb=1"'),
    "many": ({f"x{i}": i for i in range(50)}, "x0=0, .* and 42 more"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "a window": ({"sliding_window": 8}, "sliding_window=8"),
    "experts": ({"num_local_experts": 8}, "num_local_experts=8"),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act="gelu" .* it can be "silu"'),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "slices": ({"pretraining_tp": 2}, "pretraining_tp=2"),
    "one for true": ({"attention_bias": 1}, "attention_bias=1 .* true or false"),
    "a text for true": ({"tie_word_embeddings": "true"}, "tie_word_embeddings="),
    "biases": ({"attention_bias": True}, "missing tensors: .*q_proj.bias"),
    "MLP's biases": ({"mlp_bias": True}, "missing tensors: .*gate_proj.bias"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight is model.embed_tokens.weight, but"),
    "scaled positions": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling="),
    "older positions": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=.yarn"),
    "no base": ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta=0"),
    "a list of positions": ({"rope_parameters": [1]}, "rope_parameters=.* a mapping"),
    "interleaved positions": ({"rope_interleaved": True}, "rope_interleaved=true"),
    "more of positions": ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor=2.0"),
    "half turned": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5",
    ),
    "positions of kinds": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters.full_attention=",
    ),
    "a window of Mistral": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    "no experts": ({"model_type": "mixtral"}, "missing tensors: .*block_sparse_moe"),
    "too many experts": (
        {"model_type": "mixtral", "num_local_experts": 10**8},
        "num_local_experts=100000000",
    ),
    "layers of texts": (
        {"model_type": "qwen2_moe", "mlp_only_layers": ["0", "1"]},
        "mlp_only_layers=.* whole numbers",
    ),
    "no step": ({"model_type": "qwen2_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    "a window of Qwen": (
        {"model_type": "qwen2_moe", "use_sliding_window": True},
        "use_sliding_window=true",
    ),
}
GONE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


@pytest.mark.parametrize("name", OPTIONS)
def test_options(folder, name):
    options, says = OPTIONS[name]
    configure(folder, **({"mlp_bias": None, "attention_bias": None} | options))
    refused(folder, says)


@pytest.mark.parametrize("name", GONE)
def test_options_that_are_missing(folder, name):
    configure(folder, **{name: None})
    refused(folder, f"config.json has no {name}")


def test_options_of_nothing_that_counts(folder, base):
    """Names of tokens, of the software, and of training."""
    configure(folder, bos_token_id=1, transformers_version="9.9", initializer_range=7, use_cache=0)
    # from LLaMA 1, SmolLM2, and whatever transformers wrote for some months
    configure(folder, max_sequence_length=2048, is_llama_config=True, rope_interleaved=False)
    configure(folder, **{"transformers.js_config": {"dtype": 4}}, _attn_implementation_autoset=True)
    assert same(quietly(folder), quietly(base))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "nonsense", None, float])
def test_dtypes(folder, unchecked, dtype):
    with pytest.raises(ValueError, match=r"dtype=.*; it can be float32 or bfloat16"):
        load_pretrained(folder, dtype=dtype)


# Places


def test_places(folder, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("x")
    for name in ("nowhere", "loop", "a file", "case/config.json", "no\0name", "~nobody/x"):
        refused(tmp_path / name, "no such directory")
    for name in ("", "nowhere", "../nowhere", "./nowhere/x", "a/b/c", "~nobody/x", "-x/y"):
        refused(name, "no such directory|no config.json")
    refused(tmp_path / "empty", "has no config.json")
    config = folder / "config.json"
    config.unlink()
    refused(folder, "has no config.json")
    config.mkdir()
    refused(folder, "has no config.json")
    config.rmdir()
    config.symlink_to("config.json")
    refused(folder, "has no config.json")


@pytest.mark.parametrize("file", [SINGLE, "config.json", "."])
def test_unreadable(base, file):
    """The system refuses to open it; a superuser becomes nobody for as long."""
    top = Path(tempfile.mkdtemp())
    superuser = os.geteuid() == 0
    try:
        top.chmod(0o755)
        folder = copy(base, top / "case")
        (folder / file).chmod(0)
        if superuser:
            os.seteuid(65534)
        refused(folder, "ermission denied", ValueError if file == SINGLE else OSError)
    finally:
        if superuser:
            os.seteuid(0)
        (folder / file).chmod(0o755)
        shutil.rmtree(top)


# The Hub


@pytest.fixture
def hub(monkeypatch, base):
    """A Hub that has one model, as the package that asks it; its calls."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        if name != "someone/small":
            raise OSError(f"404: {name}\nfor url: https://example.org")
        return str(base)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_from_the_hub(hub, base):
    assert same(quietly("someone/small"), quietly(base))
    patterns = hub[0][1]["allow_patterns"]
    assert hub == [("someone/small", {"allow_patterns": patterns})]
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)


def test_not_on_the_hub(hub):
    refused("someone/else", "no such directory, and the Hub says: 404: someone/else$")


def test_only_names_go_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "small").write_text("a file")
    for name in ("someone/small", "../small", "./small", "a/b/c", "small", "~/small", "/a/b"):
        refused(name, "no such directory")
    assert not hub


def test_what_the_hub_has_is_no_checkpoint(hub, base, tmp_path, monkeypatch):
    def fetched(name, **options):
        return str(tmp_path)

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fetched)
    refused("someone/small", "has no config.json")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("someone/small", r"no such directory; .* pip install 'scanax\[hub\]'")
