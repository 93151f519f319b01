"""Bouncing digits and the video task: laws of the clips, a run, its pictures, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image  # it comes with matplotlib
from scanax.experiments import evaluate, train
from scanax.experiments.datasets.bouncing import clips, digits, paths
from scanax.experiments.metrics import read

SMALL = "--preset video-bouncing --model.size 16 16 --model.patch 4 --model.stages 4 --digit 8 "
SMALL += "--model.groups 2 --model.width 4 --model.depth 1 --model.convs5.groups 2 --rows 2 "
SMALL += "--frames 4 --heldout-batches 1 --condition 2 --rollout 20 --rollouts 2 --no-tensorboard "


def test_digits_to_train_are_not_those_held_out():
    train, held = (digits(8, heldout) for heldout in (False, True))
    assert len(train) + len(held) == 1797 and len(held) == 359
    rows = [{image.tobytes() for image in part} for part in (train, held)]
    assert len(rows[0]) > 1400 and not rows[0] & rows[1]
    assert train.min() == 0 and train.max() == 1


def test_paths_are_straight_at_one_speed_and_stay_inside():
    speed = 0.15
    found = paths(np.random.default_rng(0), 50, 200, speed)
    assert found.min() == 0 and found.max() == 1  # walls are reached, and not passed
    moves = np.diff(found, axis=0)
    free = ((found[1:] > 0) & (found[1:] < 1)).all(-1)  # no wall at the end of the move
    np.testing.assert_allclose(np.linalg.norm(moves, axis=-1)[free], speed, atol=1e-12)
    assert np.linalg.norm(moves, axis=-1).max() < speed + 1e-12
    # away from walls nothing turns; at one, what leads into it does
    straight = free[1:] & free[:-1]
    np.testing.assert_allclose(moves[1:][straight], moves[:-1][straight], atol=1e-12)
    wall = (found[1:-1] == 0) | (found[1:-1] == 1)
    assert (np.sign(moves[1:][wall]) == -np.sign(moves[:-1][wall])).all()


def test_clips_hold_their_digits_whole_and_the_brighter_in_front():
    shape = {"frames": 9, "size": (20, 24), "digit": 12, "speed": 0.2}
    both = clips((1, 2), range(3), **shape)
    assert both.shape == (3, 9, 20, 24, 1) and both.dtype == np.float32
    assert both.min() == -1 and both.max() <= 1
    single = clips((1, 2), range(3), count=1, **shape)
    images = {tuple(np.sort(x[x > 0])) for x in digits(12, False)}
    for frame in single.reshape(-1, 20 * 24):
        bright = (frame + 1) / 2
        assert any(
            len(x) == (bright > 0).sum() and np.allclose(x, np.sort(bright[bright > 0]), atol=1e-6)
            for x in images
        )


def test_a_row_follows_from_key_and_number_alone():
    shape = {"frames": 5, "size": (20, 20)}
    every = clips((0, 3, 4), range(4), **shape)
    np.testing.assert_array_equal(clips((0, 3, 4), range(2, 4), **shape), every[2:])
    assert len({row.tobytes() for row in every}) == 4
    assert (clips((0, 3, 5), range(4), **shape) != every).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video") / "run"
    assert train.main([*SMALL.split(), "--steps", "3", "--run", str(folder)]) == 0
    return folder


def test_a_run_logs_and_reports(run):
    rows = read(run)
    assert rows[-1]["step"] == 3 and np.isfinite(rows[-1]["heldout_mse"])
    assert (run / "loss.png").exists()


def test_evaluation_rolls_out_and_draws(run, capsys):
    assert evaluate.main(["--checkpoint", str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text("utf-8"))["rollout"]
    assert found["condition"] == 2 and found["clips"] == 2
    assert {len(curve) for curve in found["mse"].values()} == {20}
    assert found["mse"]["model"][0] > 0
    segments = [(each["from"], each["to"]) for each in found["seconds_per_frame"]]
    assert segments == [(1, 16), (17, 20)]
    assert all(each["seconds"] > 0 for each in found["seconds_per_frame"])
    printed = capsys.readouterr().out
    for name in ("rollout.png", "film.png", "rollout.gif"):
        assert str(run / name) in printed and (run / name).stat().st_size > 500
    moving = Image.open(run / "rollout.gif")
    assert moving.n_frames == 20


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--digit 17", "digit=17 is larger than frames of 16 x 16"),
        ("--condition 0", "condition=0; it must be at least 1"),
        ("--speed 1.5", "speed=1.5; it must be at least 0 and less than 1"),
        ("--mesh seq=3 --emulate-devices 3", "length=4 does not divide over seq=3"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, says, tmp_path, capsys):
    given = [*SMALL.split(), *flags.split(), "--steps", "1", "--run", str(tmp_path / "r")]
    assert train.main(given) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
