"""What a newcomer does wrong ends in one line that says what is wrong and what would be right."""

import importlib
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax import kernels, layers, models, selftest
from scanax.experiments import memory
from scanax.models import LM, LMConfig, SeriesConfig, SeriesModel, Video, VideoConfig
from scanax.models.pretrained import load_pretrained, save_pretrained
from scanax.models.vision import patches
from scanax.sharding import mesh
from scanax.sharding.schedule import Schedule
from support import wrong
from support.runs import SMALL

LONGEST = 320  # characters of a line, the folders' names apart

# Before each command line stands what makes it right but for what is wrong.
RIGHT = {
    "train": "--data.paths HERE/texts --run HERE/new --steps 3 " + SMALL,
    "evaluate": "--checkpoint HERE/run --out HERE/out ",
    "generate": "--checkpoint HERE/run --prompt ab --tokens 2 ",
    "export": "--checkpoint HERE/run --out HERE/out ",
    "plan": "stdlib ",
}
# A command and its flags, and what the line says.
COMMANDS = {
    # flags
    "train --lr 1e-3": ("--lr", "--help"),
    "train --batch-size 8": ("--batch-size", "--help"),
    "train --checkpoint runs/stdlib": ("--checkpoint", "--help"),
    "train runs/stdlib": ("runs/stdlib", "--help"),
    "train --model.patern gla": ("--model.patern", "--help"),
    "train --model.pattern": ("--model.pattern", "--help"),
    "train --preset": ("--preset", "one argument"),
    "train --preset gla-350m": ("'gla-350m' is not one of", "stdlib", "gla-340m", "--help"),
    "train --optimizer.rate fast": ("--optimizer.rate", "fast", "float"),
    "train --optimizer.rate nan": ("optimizer.rate=nan", "finite"),
    "train --optimizer.rate -1": ("optimizer.rate=-1.0", "at least 0"),
    "train --optimizer.warmup -5": ("optimizer.warmup=-5", "at least 0"),
    "train --optimizer.beta1 1.5": ("optimizer.beta1=1.5", "0 <= beta1 < 1"),
    "train --steps 1e3": ("--steps", "'1e3'", "INT"),
    "train --steps -5": ("steps=-5", "at least 1"),
    "train --minutes 0": ("minutes=0.0", "more than 0"),
    "train --accumulate 0": ("accumulate=0", "at least 1"),
    "train --seed -1": ("seed=-1", "at least 0"),
    # models
    "train --model.pattern transformer": ("mixer 'transformer'", "gla, retention"),
    "train --model.pattern gla+mlp": ("mlp 'mlp'", "swiglu, geglu, gelu"),
    "train --model.pattern gla+swiglu*3": ("3 blocks", "depth=2"),
    "train --model.pattern gla;mamba": ("mixer 'gla;mamba'", "not one of gla"),
    "train --model.pattern convs5": ("convs5 is for frames of a video", "VideoConfig"),
    "train --model.depth 0": ("depth=0", "at least 1 block"),
    "train --model.dtype bf16": ("--model.dtype", "'bf16'", "'bfloat16'"),
    "train --model.dtype float64": ("dtype=float64", "JAX_ENABLE_X64=1"),
    "train --model.remat half": ("--model.remat", "'half'", "'full'"),
    "train --model.pattern attention --model.attention.heads 3": ("width=16", "heads=3"),
    "train --model.pattern gla+moe --model.moe.router.top 9": ("top=9 of experts=8", "at most"),
    "train --model.pattern gla+moe --model.moe.router.kind top2": ("'top2'", "'switch'"),
    # data and tokenizers
    "train --data.paths": ("no paths are given", "stdlib"),
    "train --data.paths HERE/nothing": ("HERE/nothing", "no such file or directory"),
    "train --data.paths HERE/empty": ("HERE/empty is empty", "holds no file"),
    "train --data.paths HERE/empty.txt": ("empty.txt is empty", "at least 2 are needed"),
    "train --data.paths HERE/picture.png": ("picture.png is not UTF-8 text", "--data.suffixes"),
    "train --data.paths HERE/short.txt": ("short.txt (held out) is empty", "at least 2"),
    "train --length 9999": ("1672 tokens, too few for one sequence of 9999",),
    "train --data.paths HERE/rows.jsonl": ("rows.jsonl line 2", "'text'", "it has: body"),
    "train --data.paths HERE/cut.jsonl": ("cut.jsonl line 1 is not JSON",),
    "train --data.paths HERE/floats.npy --data.vocab 9": ("floats.npy", "integers", "float32"),
    "train --data.paths HERE/square.npy --data.vocab 9": ("square.npy", "one row", "(3, 4)"),
    "train --data.paths HERE/ids.npy": ("token arrays need vocab, or a tokenizer",),
    "train --data.paths HERE/ids.npy --data.vocab 0": ("vocab=0", "at least 1"),
    "train --data.paths HERE/ids.npy --data.vocab 9": ("token 99", "the vocabulary of 9"),
    "train --data.paths HERE/ids.npy HERE/texts": ("text and token arrays cannot be mixed",),
    "train --data.paths HERE/ids.npy --data.vocab 300": ("model.vocab=256", "300 tokens"),
    "train --data.tokenizer gpt2": ("gpt2: no such file", "tokenizer.json is expected"),
    "train --data.tokenizer HERE/texts": ("HERE/texts: no such file", "tokenizer.json is expected"),
    "train --data.tokenizer HERE/other.json": ("other.json is not a tokenizer.json",),
    "train --data.field body": ("field=body is for .jsonl files", "none"),
    # runs
    "train --run HERE/run": ("HERE/run exists", "--resume", "--run DIR"),
    "train --run HERE/empty.txt": ("HERE/empty.txt exists", "no folder", "--run DIR"),
    "train --resume": ("HERE/new/config.json does not exist", "not a run of train"),
    "train --resume --run HERE/empty.txt": ("HERE/empty.txt is not a run of train",),
    "train --resume --run HERE/llama": ("HERE/llama/config.json", "not the config of a run"),
    "train --resume --run HERE/json": ("HERE/json/config.json is not the config of a run",),
    "train --from HERE/torch": ("HERE/torch", "pytorch_model.bin, which is pickled", "convert"),
    # meshes
    "train --mesh 8": ("'8' is not AXIS=N", "data, expert, fsdp, seq, tensor"),
    "train --mesh dp=2": ("'dp=2' is not AXIS=N", "data, expert, fsdp, seq, tensor"),
    "train --mesh data=two": ("'data=two' is not a number of devices", "at least 1"),
    "train --mesh data=2,data=2": ("data is given twice",),
    "train --mesh data=64": ("has 64 devices, and there are 8", "--emulate-devices 64"),
    "train --mesh data=3": ("rows=4 does not divide over data=3", "3 or 6 would"),
    "train --mesh seq=8": ("length=12 does not divide over seq=8", "8 or 16 would"),
    "train --mesh tensor=3": ("does not divide over tensor=3 devices", "would"),
    "train --mesh pipe=4": ("depth=2 does not divide over pipe=4 parts", "4 would"),
    "train --emulate-devices 64": ("emulate_devices=64", "8 devices", "before anything else"),
    "train --schedule.attention ring": ("attention=ring is for a mesh with seq=2",),
    "train --schedule.attention flash": ("'flash'", "'ring'"),
    # reading a model back
    "evaluate --checkpoint HERE/texts": ("HERE/texts is no checkpoint directory", "a step"),
    "evaluate --checkpoint HERE/run/2": ("it is one checkpoint", "name HERE/run and step 2"),
    "evaluate --steps 3": ("--steps", "--help"),
    "evaluate --step newest": ("step='newest'", "a number nor best"),
    "evaluate --lengths": ("lengths=()", "at least 1"),
    "evaluate --lengths one": ("--lengths", "'one'", "--help"),
    "evaluate --data.vocab 9": ("--data flags describe --data.paths",),
    "evaluate --choices HERE/nothing": ("HERE/nothing", "cannot be read"),
    "evaluate --mesh pipe=2": ("mesh pipe=2", "only data, expert, fsdp, seq, tensor"),
    "generate --checkpoint HERE/empty": ("HERE/empty is no checkpoint directory", "a step"),
    "generate --checkpoint HERE/torch": ("pytorch_model.bin, which is pickled", "convert it"),
    "generate --checkpoint HERE/pointer": ("model.safetensors", "Git LFS", "`git lfs pull`"),
    "generate --checkpoint HERE/cut": ("model.safetensors is no safetensors file",),
    "generate --checkpoint HERE/json": ("HERE/json/config.json is not JSON",),
    "generate --checkpoint HERE/gpt2": ('model_type="gpt2" is not one of llama', "mamba"),
    "generate --checkpoint no-one/nothing": ("no-one/nothing: no such directory", "scanax[hub]"),
    "generate --prompt": ("no --prompt", "at least one token"),
    "generate --prompt a\udce9": ("--prompt 'a\\udce9' is not UTF-8",),
    "generate --length 3": ("--length", "--help"),
    "generate --temperature hot": ("--temperature", "hot", "float"),
    "generate --top-k -3": ("top_k=-3", "at least 0"),
    "generate --dtype float16": ("--dtype", "'float16'", "'bfloat16'"),
    "export --checkpoint HERE/nothing": ("HERE/nothing: no such directory",),
    "export --out HERE/texts": ("HERE/texts exists and is not empty", "choose another"),
    "export --out HERE/empty.txt": ("HERE/empty.txt exists", "choose another"),
    "export --family gpt2": ("family='gpt2' is not one of llama",),
    "export --like HERE/nothing": ("HERE/nothing: no such directory",),
    "export --like HERE/llama": ("no layout has words for this model", "llama would be"),
    # the others
    "plan --mesh seq=7": ("length=256 does not divide over seq=7", "252 or 259 would"),
    "plan --dtype fp8": ("dtype='fp8' is not one of float32, bfloat16",),
    "plan --remat half": ("remat='half' is not one of none, full, dots",),
    "plan vision-digits": ("vision-digits",),
    "tune --ops gla": ("--ops gla: not one of linear_attention",),
    "tune --out HERE/texts": ("--out HERE/texts is a folder", "name a file"),
    "benchmark --ops lstm": ("--ops lstm: not one of gla",),
    "benchmark --length 0": ("--length 0 must be at least 1",),
    "benchmark --compare HERE/texts": ("HERE/texts is a folder, no benchmark.json",),
    "reproduce mamba": ("experiment 'mamba' is not one of",),
    "reproduce decode --seeds -1 --out HERE/texts": ("--seeds (-1,)", "from 0 up"),
    "reproduce decode --jobs 9999 --out HERE/texts": ("--jobs 9999", "cores there are"),
    "selftest --only rwkv": ("--only rwkv", "linear_attention"),
    "selftest --ops attention": ("--ops attention", "--only NAME"),
    "selftest --only": ("--only", "one argument"),
    "selftest --only scan --mixer gla": ("--only", "give one"),
    "experiments": ("none is given", "evaluate, experts, export, generate, plan"),
    "experiments train --steps 5": ("python -m scanax.experiments.train",),
    "experiments finetune": ("'finetune' is not one", "train, tune"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return wrong.make(tmp_path_factory.mktemp("here"))


def run(command, words):
    """Its exit status."""
    if command == "selftest":
        return selftest.main(words)
    name = "__main__" if command == "experiments" else command
    return importlib.import_module(f"scanax.experiments.{name}").main(words)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_says_what_is_wrong(line, here, tmp_path, capsys, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nothing is asked of a network
    before = sorted(here.rglob("*"))
    command, *wrong = line.replace("HERE", str(here)).split(" ")
    right = "" if line.startswith("plan vision") else RIGHT.get(command, "")
    assert run(command, right.replace("HERE", str(here)).split() + wrong) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.endswith("\n") and said.err.count("\n") == 1, said
    message = said.err.replace(str(here), "HERE")
    assert message.startswith(f"{command}: ") and len(message) <= LONGEST, message
    for part in COMMANDS[line]:
        assert part in message, message
    assert not os.listdir(tmp_path) and sorted(here.rglob("*")) == before


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("train", "train.build"),
        ("evaluate --no-plot", "evaluate.scorer"),
        ("generate", "generate.write"),
    ],
)
def test_a_memory_that_is_too_small_is_said(line, where, here, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise FULL

    monkeypatch.setattr(f"scanax.experiments.{where}", fail)
    command, *more = line.split()
    words = RIGHT[command].replace("HERE/new", str(tmp_path)).replace("HERE", str(here))
    assert run(command, [*words.split(), *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{command}: the memory is too small (Out of memory allocating 9 bytes")
    assert said.endswith("a --mesh take less\n") and said.count("\n") == 1


def test_another_error_of_jax_is_not_called_so():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory.short(jax.errors.JaxRuntimeError("INTERNAL: broken"), "less")


def test_a_platform_that_is_not_there_is_said(here, capsys, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    assert run("generate", RIGHT["generate"].replace("HERE", str(here)).split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("generate: JAX has no devices: ") and said.count("\n") == 1
    assert "JAX_PLATFORMS=cpu" in said


TINY = LMConfig(width=16, depth=2, vocab=300, gla=layers.GLAConfig(heads=2))
OTHER = LMConfig(width=16, depth=2, vocab=300, pattern="mamba")
SOFTMAX = LMConfig(
    width=16, depth=2, pattern="attention", attention=layers.AttentionConfig(heads=2)
)
IMAGES = models.VisionConfig(image=(8, 8), channels=1, patch=4, width=24, depth=1)
VIDEO = VideoConfig(size=(8, 8), stages=(4,), groups=2, width=32, depth=1)
TOKENS = jnp.ones((2, 6), jnp.int32)
WIDE = jnp.ones((2, 6, 32), jnp.float32)
RESET = jnp.zeros((2, 6), bool)
Q = jnp.ones((2, 6, 4, 8), jnp.float32)
LOGS = jnp.zeros(4, jnp.float32)
U, A, B = WIDE, jnp.ones((32, 3), jnp.float32), jnp.ones((2, 6, 3), jnp.float32)


def made(kind, *given):
    return kind(*given, rngs=nnx.Rngs(0))


def lm(config=TINY):
    return made(LM, config)


def options(**changes):
    return lambda: LMConfig(**changes)


def over(text, call):
    """A call on a mesh."""

    def on_it():
        with jax.sharding.use_abstract_mesh(mesh.make(text).abstract_mesh):
            return call()

    return on_it


CALLS = {
    # configs
    "mixer 'transformer'; gla, retention": options(pattern="transformer"),
    "mlp.ratio=-1.0; more than 0": options(mlp=layers.MLPConfig(ratio=-1.0)),
    "dtype='bf16'; float32, bfloat16": options(dtype="bf16"),
    "width='256'; a whole number": options(width="256"),
    "norm_eps='small'; a number": options(norm_eps="small"),
    "pattern=['gla']; a text": options(pattern=["gla"]),
    "attention={'heads': 4}; AttentionConfig": options(attention={"heads": 4}),
    "mamba.norm='rms'; none, plain, weighted": (
        lambda: LMConfig(mamba=layers.MambaConfig(norm="rms"))
    ),
    "gla.heads=0; at least 1": options(gla=layers.GLAConfig(heads=0)),
    "router.top=8 of experts=4; at most all": lambda: layers.MoEConfig(
        4, router=layers.RouterConfig(top=8)
    ),
    "kind='top2'; softmax, gshard": lambda: layers.RouterConfig(kind="top2"),
    "attention='flash'; gather, ring": lambda: Schedule(attention="flash"),
    # models
    "config is a str; LMConfig": lambda: made(LM, "gla-340m"),
    "config is a LMConfig; VisionConfig": lambda: made(models.Vision, models.PRESETS["gla-340m"]),
    "rngs is a int; flax.nnx.Rngs": lambda: LM(TINY, rngs=0),
    "dtype=float64; JAX_ENABLE_X64=1": lambda: lm(LMConfig(dtype="float64")),
    "5 heads must divide; key width 128": lambda: lm(LMConfig(gla=layers.GLAConfig(heads=5))),
    "width=16; heads=3": lambda: made(layers.Attention, 16, layers.AttentionConfig(heads=3)),
    "kv_heads=3; heads=4": lambda: made(
        layers.Attention, 16, layers.AttentionConfig(4, kv_heads=3)
    ),
    # what they are given
    "tokens is float32; int32": lambda: lm()(TOKENS.astype(jnp.float32)),
    "tokens is uint8; int32": lambda: lm()(TOKENS.astype(jnp.uint8)),
    "tokens is a list; an array (B, T)": lambda: lm()([[1, 2]]),
    "tokens has shape (6,); (B, T)": lambda: lm()(TOKENS[0]),
    "tokens has shape (2, 0); at least 1": lambda: lm()(TOKENS[:, :0]),
    "tokens has shape (2, 6, 32); (B, T)": lambda: lm()(WIDE),
    "targets has shape (2, 5); tokens (2, 6)": lambda: lm().nll(TOKENS, TOKENS[:, 1:]),
    "reset is int32; it must be bool": lambda: lm()(TOKENS, None, TOKENS),
    "reset has shape (2, 5); (2, 6)": lambda: lm()(TOKENS, None, RESET[:, 1:]),
    "state is a; init_state makes": lambda: lm()(TOKENS, RESET),
    "S of shape (3, 2, 4, 8); not (2, 2, 4, 8); init_state": (
        lambda: lm()(TOKENS, lm().init_state(3, 9))
    ),
    "state's entry 0; init_state": lambda: lm()(TOKENS, lm(OTHER).init_state(2, 9)),
    "k of shape (3, 2, 9, 8); not (2, 2, ..., 8)": (
        lambda: lm(SOFTMAX)(TOKENS, lm(SOFTMAX).init_state(3, 9))
    ),
    "batch=0; at least 1": lambda: lm().init_state(0, 9),
    "max_length=0; at least 1": lambda: lm(SOFTMAX).init_state(1, 0),
    "x has 32 features; takes 16": lambda: made(layers.GLA, 16)(WIDE),
    "x has 32 features; experts take 16": lambda: made(layers.MoE, 16)(WIDE),
    "x has shape (6, 32); (B, T, D)": lambda: made(layers.Attention, 32)(WIDE[0]),
    "reset has shape (2, 6, 32)": lambda: made(layers.Mamba, 32)(WIDE, None, WIDE > 0),
    "patches has shape (1, 8, 8, 1); (B, N, features)": (
        lambda: made(models.Vision, IMAGES)(jnp.ones((1, 8, 8, 1), jnp.float32))
    ),
    "patches of 5 x 5; that the patch divides": lambda: patches(np.ones((1, 8, 8, 1)), 5),
    "frames of (9, 9, 1); takes (8, 8, 1)": (
        lambda: made(Video, VIDEO)(jnp.ones((1, 2, 9, 9, 1), jnp.float32))
    ),
    "x has 32 features; takes 1": lambda: made(SeriesModel, SeriesConfig())(WIDE),
    # operations
    "k has 3 heads; divide 4": lambda: kernels.linear_attention(Q, Q[:, :, :3], Q, LOGS),
    "differ in batch or length": lambda: kernels.linear_attention(Q, Q[:, :5], Q, LOGS),
    "log_decay has shape (4, 8); 1 or 3 or 4": lambda: kernels.linear_attention(Q, Q, Q, Q[0, 0]),
    "holds no token; at least one": lambda: kernels.linear_attention(*[Q[:, :0]] * 3, LOGS),
    "q is int32; float32": lambda: kernels.linear_attention(Q.astype(int), Q, Q, LOGS),
    "q is a list; an array": lambda: kernels.linear_attention([1.0], Q, Q, LOGS),
    "chunk=0; at least 1": lambda: kernels.linear_attention(Q, Q, Q, LOGS, chunk=0),
    "state has shape (3, 4, 8, 8); (2, 4, 8, 8)": (
        lambda: kernels.linear_attention(Q, Q, Q, LOGS, state=jnp.ones((3, 4, 8, 8)))
    ),
    "reset is int32; bool": lambda: kernels.attention(Q, Q, Q, reset=TOKENS),
    "window=0; at least 1": lambda: kernels.attention(Q, Q, Q, window=0),
    "1 queries and 6 keys; q_index": lambda: kernels.attention(Q[:, :1], Q, Q),
    "q has 8 features and k 4; equal": lambda: kernels.attention(Q, Q[..., :4], Q),
    "A has shape (3, 32); (32, 32)": lambda: kernels.selective_scan(U, U, A.T, B, B),
    "u is complex64; (real, imaginary)": lambda: kernels.diagonal_scan(WIDE * 1j, (LOGS, LOGS)),
    "state is a dict; (m, u, w)": lambda: kernels.fixed_query(Q[0, 0], Q, Q, state={"m": LOGS}),
    "sizes is float32; whole numbers": lambda: kernels.grouped_matmul(A, WIDE, LOGS),
    # meshes
    "'time=2'; data, expert, fsdp, seq, tensor": lambda: mesh.make("time=2"),
    "seq is given twice": lambda: mesh.make("seq=2,seq=4"),
    "64 devices; there are 8": lambda: mesh.make("data=64"),
    "length=6; seq=4; 4 or 8 would": over("seq=4", lambda: lm()(TOKENS)),
    "rows=2; data=4; 4 would": over("data=4", lambda: lm()(TOKENS)),
    "heads=4; tensor=8; 8 would": over("tensor=8", lambda: made(layers.Attention, 32)(WIDE)),
    # published weights
    "/no/such/folder: no such directory": lambda: load_pretrained("/no/such/folder"),
    "dtype=float16; float32 or bfloat16": lambda: load_pretrained("anywhere", dtype="float16"),
    "mesh='seq=2'; sharding.mesh.make": lambda: load_pretrained("anywhere", mesh="seq=2"),
    "model is a Vision; LM": lambda: save_pretrained(made(models.Vision, IMAGES), "new"),
    "family='gpt2'; llama, mistral": lambda: save_pretrained(lm(), "new", family="gpt2"),
    "no layout has words; llama would be": lambda: save_pretrained(lm(), "new", family="llama"),
}


def is_said(call, kind, parts):
    """It raises an error of this kind, of one line with all parts."""
    with pytest.raises(kind) as caught:
        jax.eval_shape(call)  # nothing is compiled for what is refused
    message = str(caught.value)
    assert message.isprintable() and len(message) <= LONGEST, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("says", CALLS)
def test_a_call_says_what_is_wrong(says, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    is_said(CALLS[says], ValueError, says.split("; "))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flash", "linear_attention has no implementation 'flash'; it has pallas_tpu, pallas_gpu"),
        ("pallas_tpu", "pallas_tpu: it runs on TPUs, and this is cpu"),
        ("pallas_gpu", "pallas_gpu: "),
    ],
)
def test_an_implementation_that_does_not_run_here_is_said(name, says):
    def call():
        return kernels.linear_attention(Q, Q, Q, LOGS, implementation=name)

    is_said(call, NotImplementedError, [says])


def test_a_file_is_no_place_for_a_model(here):
    def call():
        save_pretrained(lm(), here / "short.txt")

    is_said(call, FileExistsError, ["short.txt exists", "choose another"])
