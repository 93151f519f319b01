"""Training that begins with weights that are there: any mesh, resuming without them, refusals."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scanax.experiments import checkpoint, config, export, flags, loading, metrics, step, train
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.lm import LMTask
from scanax.models import LMConfig
from scanax.sharding import mesh
from scanax.sharding.schedule import PLAIN
from support import published
from support.compare import close

SHORT = "--rows 4 --length 12 --heldout-batches 1 --final-batches 1 --log-every 1 --steps 3 "
SHORT += "--optimizer.warmup 2 --no-plot --no-tensorboard --validate-every 0 "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Published weights, a text, and a run of three steps from them."""
    folder = tmp_path_factory.mktemp("from")
    published.make(folder / "llama")
    published.make(folder / "bare", tokenizer=False)
    (folder / "text.txt").write_text("def add(first, second):\n    return first + second\n" * 20)
    np.save(folder / "tokens.npy", np.arange(900) % 97)
    assert train.main(args(folder, "run")) == 0
    return folder


def args(folder, run, more="", source="llama"):
    words = f"--from {folder / source} --run {folder / run} --data.paths {folder}/text.txt {SHORT}"
    return f"{words}{more}".split()


def losses(run):
    return np.array([row["loss"] for row in metrics.read(run)])


def test_the_first_loss_is_that_of_the_weights(folder):
    made = flags.train(args(folder, "new"))
    assert made.task.data.tokenizer == str(folder / "llama" / "tokenizer.json")
    batch = made.task.batches(made.seed, 0)
    model = loading.load(folder / "llama").model
    given = jax.device_put([batch[name] for name in ("tokens", "targets")])
    nll = np.asarray(model.nll(*given, reset=jax.device_put(batch["reset"]))[0])
    expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
    close(losses(folder / "run")[0], expected, 1e-5)
    assert losses(folder / "run")[-1] < expected


def test_the_run_says_where_it_began_and_goes_on_without(folder, tmp_path, capsys):
    assert json.loads((folder / "run" / "config.json").read_text())["source"].endswith("llama")
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    gone = json.loads(path.read_text()) | {"source": str(tmp_path / "gone")}
    path.write_text(json.dumps(gone))
    more = ["--run", str(tmp_path / "run"), "--resume", "--steps", "4"]
    assert train.main(more) == 0 and checkpoint.latest(tmp_path / "run") == 4
    assert len(losses(tmp_path / "run")) == 4
    # killed before its first checkpoint, it begins again, and needs them
    for number in checkpoint.steps(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / str(number))
    assert train.main(more) == 2
    assert f"{tmp_path}/gone: no such directory" in capsys.readouterr().err
    path.write_text(json.dumps(gone | {"source": str(folder / "llama")}))
    run = train.prepare(flags.train(more))
    want = loading.load(folder / "llama").model.embedding[...]
    assert np.array_equal(run.state["params"]["embedding"], want) and run.step == 0


@pytest.mark.parametrize("over", ["pipe=2,seq=2", "fsdp=2,tensor=2 --model.vocab-multiple 2"])
def test_any_mesh_trains_as_one_device(over, folder):
    run = f"over {over}".replace(" ", "-")
    assert train.main(args(folder, run, f"--mesh {over} --model.remat full")) == 0
    close(losses(folder / run), losses(folder / "run"), 1e-5)


def test_a_run_begins_with_another_ones_weights(folder, tmp_path):
    """Step 0 and no moments; its tokens too."""
    made = flags.train(args(folder, "second", source="run"))
    run = train.prepare(made)
    saved = loading.load(folder / "run")
    assert run.step == 0 and made.task.model == saved.config.task.model
    assert np.array_equal(run.state["params"]["embedding"], saved.model.embedding[...])
    assert not any(np.any(x) for x in jax.tree.leaves(run.state["optimizer"]))
    assert made.task.data.tokenizer == saved.tokenizer.path
    assert config.from_json(json.loads(json.dumps(config.to_json(made)))) == made


def test_what_is_trained_is_exported(folder, tmp_path):
    out = tmp_path / "out"
    words = ["--checkpoint", str(folder / "run"), "--out", str(out)]
    assert export.main([*words, "--like", str(folder / "llama")]) == 0
    tokens = jnp.arange(9)[None]
    ours, theirs = (loading.load(where) for where in (folder / "run", out))
    assert np.array_equal(ours.model(tokens)[0], theirs.model(tokens)[0])
    assert theirs.tokenizer.encode("def a").tolist() == ours.tokenizer.encode("def a").tolist()
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 256


def test_random_parameters_are_not_made_beside_them():
    """The state's arrays are those that were given, and zeros."""
    task, over = LMTask(model=LMConfig(width=128)), mesh.make()
    start, _ = step.compiled(task, OptimizerConfig(), 1, over, PLAIN)
    _, shapes, _ = step.blueprint(task, over)
    memory = start.lower(jax.random.key(0), shapes).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size / 50


def test_how_it_is_computed_is_the_flags(folder):
    more = "--model.dtype bfloat16 --model.loss-chunk 7 --model.moe.router.balance 0.5"
    model = flags.train(args(folder, "new", more)).task.model
    assert (model.dtype, model.loss_chunk, model.moe.router.balance) == ("bfloat16", 7, 0.5)
    assert (model.width, model.vocab, model.attention.kv_heads) == (32, 97, 2)


BAD = {
    "--model.width 64": "--from {llama} holds another model: width=64, not 32",
    "--model.attention.kv-heads 4": "holds another model: attention.kv_heads=4, not 2",
    "--model.pattern attention+gelu": "holds another model: blocks=",
    "--from {bare}": "{bare} has no tokenizer.json; name one with --data.tokenizer",
    "--from {bare} --data.tokenizer bytes": "model.vocab=97, but the corpus has 256 tokens",
    "--resume": "--from {llama} begins a new run, --resume goes on with one",
    "--from {bare}/none": "{bare}/none: no such directory",
    "--mesh tensor=2": "embedding.*tensor=2",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_wrong_flag_is_one_line_and_nothing_is_written(flag, folder, capsys):
    names = {"llama": folder / "llama", "bare": folder / "bare"}
    before = sorted(folder.rglob("*"))
    assert train.main(args(folder, "new", flag.format(**names))) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"train: .*{BAD[flag].format(**names)}.*\n", said)
    assert sorted(folder.rglob("*")) == before


def test_token_arrays_need_no_tokenizer(folder):
    more = f"--data.paths {folder}/tokens.npy --data.vocab 97"
    assert flags.train(args(folder, "new", more, source="bare")).task.data.tokenizer is None
