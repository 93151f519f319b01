"""Digits in the trainer: their split, how they are resized, a run and what is measured of it."""

import json

import jax
import numpy as np
import pytest
from scanax.experiments import evaluate, flags, metrics, train
from scanax.experiments.configs.vision_digits import config
from scanax.experiments.datasets.images import resized, shifted
from scanax.experiments.tasks.vision import VisionTask
from scanax.models import VISION_PRESETS
from support.compare import close

SMALL = "--preset vision-digits --model.image 8 8 --model.depth 2 --model.width 16 --rows 40 "
SMALL += "--no-tensorboard --log-every 1 --shift 1 --optimizer.decay-steps 4 "


def args(run, more=""):
    return f"{SMALL} --run {run} {more}".split()


def test_images_to_test_on_are_never_trained_on():
    (seen, _), (held, labels) = VisionTask(model=config.task.model).data
    assert seen.shape == (1437, 16, 16) and held.shape == (360, 16, 16)
    known = {image.tobytes() for image in seen}
    assert not any(image.tobytes() in known for image in held)
    assert np.bincount(labels, minlength=10).min() > 20


def test_resizing():
    """Copies, or straight lines between the centres of pixels, the same along both axes."""
    image = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    copied = resized(image, (8, 12), "nearest")
    np.testing.assert_array_equal(copied, image.repeat(2, axis=1).repeat(3, axis=2))
    slope = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 4, 4))
    between = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    line = resized(slope, (4, 8), "linear")
    close(line, np.broadcast_to(np.array(between), (1, 4, 8)), 1e-6)
    close(resized(slope.swapaxes(1, 2), (8, 4), "linear"), line.swapaxes(1, 2), 1e-6)
    for method in ("nearest", "linear"):
        np.testing.assert_array_equal(resized(image, (4, 4), method), image)


def test_shifts_lose_what_leaves_and_let_zeros_in():
    image = np.arange(1, 10, dtype=np.float32).reshape(1, 3, 3)
    by = np.array([[1, -1], [0, 2], [0, 0]])
    found = shifted(np.repeat(image, 3, axis=0), by)
    np.testing.assert_array_equal(found[0], [[0, 0, 0], [2, 3, 0], [5, 6, 0]])
    np.testing.assert_array_equal(found[1], [[0, 0, 1], [0, 0, 4], [0, 0, 7]])
    np.testing.assert_array_equal(found[2], image[0])


def test_an_epoch_has_every_image_once_and_any_rows_can_be_asked_for():
    task = VisionTask(rows=479, model=config.task.model)  # 3 steps are an epoch
    whole = [task.batches(5, step) for step in range(3)]
    first = np.concatenate([batch["patches"] for batch in whole])
    images, _ = task.data[0]
    assert first.shape == (1437, 64, 4) and first.min() == -1 and first.max() == 1
    mine = np.sort(first.reshape(1437, -1).sum(axis=1))
    close(mine, np.sort((2 * images - 1).reshape(1437, -1).sum(axis=1)), 1e-5)
    task = VisionTask(rows=6, shift=2, model=config.task.model)
    for name, x in task.batches(5, 400).items():
        np.testing.assert_array_equal(x[2:4], task.batches(5, 400, slice(2, 4))[name])
    assert (task.batches(6, 400)["patches"] != task.batches(5, 400)["patches"]).any()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of four steps, the third and the fourth after it was resumed, and one that was not."""
    folder = tmp_path_factory.mktemp("vision")
    for name, steps in (("resumed", 2), ("straight", 4)):
        assert train.main(args(folder / name, f"--steps {steps}")) == 0
    assert train.main(["--resume", "--run", str(folder / "resumed"), "--steps", "4"]) == 0
    return folder


def test_a_resumed_run_ends_as_one_that_never_stopped(done):
    ends = [metrics.read(done / name)[-1] for name in ("resumed", "straight")]
    for name in ("heldout_loss", "heldout_accuracy"):
        assert ends[0][name] == ends[1][name]


def test_evaluate_measures_all_test_images_and_draws_early_exits(done, capsys):
    assert evaluate.main(["--checkpoint", str(done / "straight")]) == 0
    found = json.loads((done / "straight" / "evaluation.json").read_text())
    assert "accuracy" in capsys.readouterr().out
    last = metrics.read(done / "straight")[-1]
    close(found["heldout"]["loss"], last["heldout_loss"], 1e-5)
    exits = found["early_exit"]
    assert [each["patches"] for each in exits] == [4, 8, 12, 16]
    # the recurrent form after all patches is the parallel one
    assert abs(exits[-1]["accuracy"] - found["heldout"]["accuracy"]) < 1.5 / 360
    picture = (done / "straight" / "early_exit.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_few_steps_over_eight_devices_are_those_of_one(done, tmp_path):
    more = "--steps 4 --mesh fsdp=2,seq=2,tensor=2"
    run = train.prepare(flags.train(args(tmp_path / "r", more)))
    train.train(run)
    for x, place in zip(*map(jax.tree.leaves, (run.state, run.program.places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    ours, theirs = (metrics.read(folder) for folder in (tmp_path / "r", done / "straight"))
    losses = [np.array([row["loss"] for row in rows if "loss" in row]) for rows in (ours, theirs)]
    close(*losses, 1e-5)


def test_models_of_published_sizes_are_presets():
    made = flags.train(["--preset", "vir-s", "--run", "r"])
    assert made.task.model == VISION_PRESETS["vir-s"]
    batch = made.task.batches(0, 0, slice(2))  # digits of 224 x 224 pixels with three channels
    assert batch["patches"].shape == (2, 196, 768)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--rows 0", "rows=0; it must be at least 1"),
        ("--shift 8", "shift=8 moves an image of (8, 8) out of it"),
        ("--model.classes 9", "model.classes=9; there are 10 digits"),
        ("--model.patch 3", "patch=3 does not divide an image of 8 x 8"),
    ],
)
def test_flags_that_cannot_be(more, says, tmp_path, capsys):
    assert train.main(args(tmp_path / "r", more)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train: ") and says in line
