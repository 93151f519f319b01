"""Every answer stands in its row, rows follow from their numbers, and the task trains."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.experiments import evaluate, metrics, tasks, train
from scanax.experiments.datasets import recall
from scanax.experiments.tasks.recall import RecallTask
from scanax.layers import MambaConfig
from scanax.models import LMConfig
from support.compare import close

PROBLEMS = {
    "selective-copying": partial(recall.selective_copying, length=40, items=6, vocab=9),
    "induction": partial(recall.induction, length=23, vocab=7),
    "induction, asked often": partial(recall.induction, length=40, items=6, vocab=7),
    "mqar": partial(recall.mqar, length=33, pairs=9, vocab=24),
    "mqar, asked soon": partial(recall.mqar, length=33, pairs=7, vocab=24, alpha=0.01),
}
ROWS, KEY = range(50), (0, 3, 2)


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]


def solved(name, tokens):
    """{place: answer} of a row, by a list and a dictionary."""
    tokens = tokens.tolist()
    if name == "selective-copying":
        data = [token for token in tokens if token not in (recall.NOISE, recall.MARKER)]
        markers = [i for i, token in enumerate(tokens) if token == recall.MARKER]
        return dict(zip(markers, data, strict=True))
    if name == "induction":
        first, *again = (i for i, token in enumerate(tokens) if token == recall.TRIGGER)
        assert again[-1] == len(tokens) - 1 and len(again) in (1, 6)
        return dict.fromkeys(again, tokens[first + 1])
    pairs = sum(token > 11 for token in tokens)  # 11 keys, then the values
    told = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
    return {i: told[key] for i, key in enumerate(tokens) if i >= 2 * pairs and key != recall.FILLER}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_answer_is_in_its_row_and_due_where_it_is_asked(name):
    batch = PROBLEMS[name](KEY, ROWS)
    assert {k: x.dtype for k, x in batch.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "weights": np.float32,
        "reset": bool,
    }
    for tokens, targets, weights, reset in zip(*batch.values(), strict=True):
        answers = solved(name.split(",")[0], tokens)
        assert np.flatnonzero(weights).tolist() == list(answers) and set(weights) <= {0, 1}
        assert targets[list(answers)].tolist() == list(answers.values())
        assert np.flatnonzero(reset).tolist() == [0]


def test_a_row_follows_from_its_number_alone(problem):
    batch = problem(KEY, ROWS)
    for name, part in problem(KEY, (41, 7)).items():
        np.testing.assert_array_equal(part, batch[name][[41, 7]])


def test_other_seeds_steps_and_held_out_rows_are_others(problem):
    keys = (KEY, (1, 3, 2), (0, 4, 2), (0, 3, 1))
    rows = [row.tobytes() for key in keys for row in problem(key, ROWS)["tokens"]]
    assert len(set(rows)) == len(rows)


def test_places_are_spread_as_said():
    """Data and triggers over all they may take; queries over all, or soon by a power law."""
    many = range(2000)
    data = recall.selective_copying(KEY, many, length=20, items=4)["tokens"][:, :16]
    np.testing.assert_allclose((data > recall.MARKER).mean(0), 4 / 16, atol=0.05)
    first = (recall.induction(KEY, many, length=12)["tokens"][:, :-1] == recall.TRIGGER).mean(0)
    np.testing.assert_allclose(first, [*[0.1] * 10, 0], atol=0.03)
    for alpha in (1.0, 0.01):
        asked = recall.mqar(KEY, many, length=18, pairs=1, alpha=alpha)["weights"][:, 2:].mean(0)
        power = np.arange(1, 17) ** (alpha - 1)
        np.testing.assert_allclose(asked, power / power.sum(), atol=0.04)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (partial(recall.selective_copying, length=31), "length=31 .* items=16 .* at least 32"),
        (partial(recall.induction, length=6, items=3), "length=6 .* items=3 .* at least 7"),
        (partial(recall.mqar, length=23), "length=23 .* pairs=8 .* at least 24"),
        (partial(recall.mqar, length=24, vocab=16), "vocab=16 .* pairs=8; it must be at least 17"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(KEY, ROWS)


MODEL = LMConfig(vocab=20, width=8, depth=1, pattern="mamba", mamba=MambaConfig(state=2))
TASKS = {
    "item": RecallTask(length=24, items=4, model=MODEL),
    "length": RecallTask(problem="induction", length=24, items=2, model=MODEL),
    "pairs": RecallTask(problem="mqar", length=24, items=4, model=MODEL),
}


@pytest.fixture(scope="module")
def model():
    return TASKS["item"].build(nnx.Rngs(0))


def test_loss_and_shares_are_those_of_the_likeliest_tokens(model):
    task = dataclasses.replace(TASKS["pairs"], items=1)
    batch = task.batches(0, 0)
    logits = np.asarray(model(jnp.asarray(batch["tokens"]))[0], np.float64)
    asked = batch["weights"] > 0
    batch["targets"][:3] = logits.argmax(-1)[:3]  # three rows are right
    logits, targets = logits[asked], batch["targets"][asked]
    total = np.log(np.exp(logits).sum(-1)) - logits[range(8), targets]
    loss, (_, found) = nnx.jit(task.loss)(model, jax.tree.map(jnp.asarray, batch), None)
    close((loss, found["loss"]), (total.mean(), total.mean()), 1e-5)
    right = (logits.argmax(-1) == targets).mean()
    assert right >= 3 / 8 and float(found["accuracy"]) == float(found["exact"]) == right
    assert float(found["weight"]) == 8


def test_rows_read_in_pieces_are_read_as_a_whole(model, monkeypatch):
    batch = TASKS["item"].batches(0, 0)
    whole = tasks.recall.reader(model)(batch)
    monkeypatch.setattr(tasks.recall, "PIECE", 8)
    np.testing.assert_array_equal(tasks.recall.reader(model)(batch), whole)
    np.testing.assert_array_equal(model(jnp.asarray(batch["tokens"]))[0].argmax(-1), whole)


@pytest.mark.parametrize(
    ("over", "points"), [("item", [1, 2, 3, 4]), ("length", [16, 24]), ("pairs", [1, 2, 4, 8])]
)
def test_a_curve_is_of_the_answers(over, points, model, tmp_path, monkeypatch):
    """Of a model that always finds them it is 1 everywhere, of one that never does 0."""
    monkeypatch.setattr(tasks.recall, "LENGTHS", (16, 24))
    name = {"item": "selective-copying", "length": "induction", "pairs": "mqar"}[over]
    for off, share in ((0, 1.0), (1, 0.0)):
        monkeypatch.setattr(tasks.recall, "reader", lambda _, off=off: lambda b: b["targets"] + off)
        found = TASKS[over].examine(model, tmp_path)
        curve = [{over: x, "accuracy": share} for x in points]
        # 16 channels of a window of 3 and 2 numbers of state, float32
        assert found == {"state_bytes": 16 * (3 + 2) * 4, f"by_{over}": curve}
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_trained_and_evaluated(tmp_path, capsys):
    """By a preset, which flags make small; a model without selection too."""
    run = tmp_path / "run"
    given = f"--preset recall-selective-copying --run {run} --steps 3 --rows 4 --length 24 "
    given += "--items 4 --model.width 8 --model.depth 1 --model.mamba.state 2 "
    given += "--model.mamba.no-selective --heldout-batches 2 --final-batches 2 "
    given += "--log-every 1 --no-plot --no-tensorboard"
    assert train.main(given.split()) == 0
    assert "held-out answers right: " in capsys.readouterr().out
    last = metrics.read(run)[-1]
    assert 0 <= last["heldout_exact"] <= last["heldout_accuracy"] <= 1
    assert evaluate.main(["--checkpoint", str(run), "--no-plot"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert len(found["by_item"]) == 4
    assert found["heldout"]["accuracy"] == pytest.approx(last["heldout_accuracy"], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--items 200", "length=256 has no room for items=200 and as many markers"),
        ("--alpha 0.5", "alpha=0.5 is for mqar; selective-copying has no queries"),
        ("--problem induction --length 32", "length=32 has no room for items=16 triggers and"),
        ("--rows 0", "rows=0; it must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(more, says, tmp_path, capsys):
    given = ["--preset", "recall-selective-copying", "--run", str(tmp_path / "r"), *more.split()]
    assert train.main(given) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said and not (tmp_path / "r").exists()
