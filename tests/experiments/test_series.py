"""Forecasts, events and digits: their data are what they say, and they train like any task."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from scanax.experiments import evaluate, metrics, train
from scanax.experiments.datasets import hawkes, series
from scanax.experiments.datasets.images import handwritten
from scanax.experiments.tasks import Task, digits, events
from scanax.experiments.tasks.forecast import ForecastTask
from support.compare import close

PROCESS = hawkes.Process(np.array([0.3, 0.1]), np.array([[0.2, 0.5], [0.3, 0.1]]), 1.5)


def intensity(process, at, times, types):
    """lambda_k(t) by its definition, of the events before t."""
    before = times < at
    kicks = process.decay * np.exp(-process.decay * (at - times[before]))
    return process.base + (process.branching[:, types[before]] * kicks).sum(axis=1)


def compensator(process, at, times, types):
    """The integral of the whole intensity from 0 to t, in closed form."""
    before = times < at
    done = -np.expm1(-process.decay * (at - times[before]))
    return process.base.sum() * at + (process.branching[:, types[before]].sum(0) * done).sum()


def test_the_process_has_its_mean_rates():
    times, types = hawkes.simulate(PROCESS, 100, 1000, np.random.default_rng(0))
    late = slice(200, None)
    span = (times[:, -1] - times[:, 199]).sum()
    rates = np.bincount(types[:, late].reshape(-1)) / span
    np.testing.assert_allclose(rates, PROCESS.rates, rtol=0.02)
    assert 0 < PROCESS.ratio < 1 and 0 < hawkes.CYCLE.ratio < 1


def test_the_compensator_at_the_events_grows_by_unit_exponentials():
    times, types = (x[0] for x in hawkes.simulate(PROCESS, 1, 1500, np.random.default_rng(1)))
    grown = np.diff([compensator(PROCESS, at, times, types) for at in times], prepend=0.0)
    assert scipy.stats.kstest(grown, "expon").pvalue > 0.05
    first, second = grown[:-1], grown[1:]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_true_nats_are_those_of_a_numerical_integral():
    both = hawkes.simulate(PROCESS, 3, 8, np.random.default_rng(2))
    found = hawkes.nats(PROCESS, *both)
    for row, (times, types) in enumerate(zip(*both, strict=True)):
        last = 0.0
        for i, (at, which) in enumerate(zip(times, types, strict=True)):
            of = times[:i], types[:i]
            total = scipy.integrate.quad(
                lambda t, of=of: intensity(PROCESS, t, *of).sum(), last, at
            )
            rates, last = intensity(PROCESS, at, *of), at
            expected = total[0] - np.log(rates.sum()), -np.log(rates[which] / rates.sum())
            np.testing.assert_allclose([x[row, i] for x in found], expected, rtol=1e-8)


def test_without_excitement_it_is_a_poisson_process():
    calm = PROCESS._replace(branching=np.zeros((2, 2)))
    times, types = hawkes.simulate(calm, 4, 50, np.random.default_rng(3))
    waits = np.diff(times, axis=1, prepend=0.0)
    close(hawkes.nats(calm, times, types), hawkes.poisson(waits, types, calm.base), 1e-12)


def test_the_mixture_is_a_density_of_the_expectation_it_says():
    said = jnp.asarray(np.random.default_rng(4).normal(size=9) / 2, jnp.float32)
    logs = np.linspace(-9, 9, 4001)
    waits = jnp.asarray(np.exp(logs), jnp.float32)
    nats, expected = events.log_normal(jnp.tile(said, (4001, 1)), waits, (0.3, 0.7))
    density = np.exp(logs - np.asarray(nats, np.float64))  # of the logarithm
    assert np.trapezoid(density, logs) == pytest.approx(1, abs=1e-4)
    assert np.trapezoid(density * np.exp(logs), logs) == pytest.approx(float(expected[0]), rel=1e-3)


def drawn(seed=0, size=200):
    return np.cumsum(np.random.default_rng(seed).normal(size=size))


def cut(values):
    return series.cut(series.KINDS["elnino"], values)


@pytest.mark.parametrize("relative", [True, False])
def test_nothing_held_out_is_trained_on(relative):
    """Other values after the training part: the same windows to the bit, and the same units."""
    values, sizes = drawn(), (20, 6, 4, relative)
    one = cut(values)
    first, last = one.ends
    other = cut(np.concatenate([values[:first], drawn(1)[first:]]))
    origins = np.array(one.origins("training", 20, 6))
    assert origins[0] == 19 and origins[-1] + 6 == first - 1
    found = (series.windows(each, origins, *sizes) for each in (one, other))
    for a, b in zip(*(each.values() for each in found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.mean, one.deviation) == (other.mean, other.deviation)
    validation, test = (one.origins(part, 20, 6) for part in ("validation", "test"))
    assert (validation[0] + 1, validation[-1] + 6) == (first, last - 1)
    assert (test[0] + 1, test[-1] + 6) == (last, len(values) - 1)


@pytest.mark.parametrize("relative", [True, False])
def test_a_window_says_at_each_value_what_comes_after_it(relative):
    found, origin = cut(drawn()), 60
    batch = series.windows(found, np.array([origin]), 5, 2, 3, relative)
    for i, at in enumerate(range(origin - 4, origin + 1)):
        lags = found.values[[max(at - j, origin - 4) for j in range(3)]]
        ahead, scale = found.values[at + 1 : at + 3], 1.0
        if relative:
            scale = np.sqrt(lags.var() + series.LEAST**2)
            lags, ahead = (lags - found.values[at]) / scale, ahead - found.values[at]
        np.testing.assert_allclose(batch["x"][0, i], lags, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch["targets"][0, i], ahead, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch["scale"][0, i], scale, rtol=1e-6)


def test_baselines_know_no_later_value():
    found = cut(drawn())
    errors = {"last value": [], "last season": []}
    for origin in found.origins("test", 20, 15):
        for ahead in range(1, 16):
            truth, same = found.values[origin + ahead], origin + ahead
            while same > origin:
                same -= 12
            errors["last value"].append(found.values[origin] - truth)
            errors["last season"].append(found.values[same] - truth)
    for name, one in series.naive(found, 15, 20).items():
        assert one["mse"] == pytest.approx(np.mean(np.square(errors[name])))
        assert one["mae"] == pytest.approx(np.mean(np.abs(errors[name])))


@pytest.mark.parametrize("name", series.KINDS)
def test_the_series_are_there(name):
    found = series.load(name)
    assert np.isfinite(found.values).all() and len(found.values) > 200
    assert found.values[: found.ends[0]].std() == pytest.approx(1)
    years = found.years(np.array([0, len(found.values)]))
    assert 1700 <= years[0] < 1960 and 2001 < years[1] < 2012


def test_digits_are_split_once():
    (x, labels), (held, _) = digits.images()
    assert len(x) == 1437 and len(held) == 360 and x.shape[1:] == (64, 1)
    assert x.min() == 0 and x.max() == 1 and set(labels) == set(range(10))
    assert not {image.tobytes() for image in x} & {image.tobytes() for image in held}


@pytest.mark.parametrize("kind", [ForecastTask, events.EventsTask, digits.DigitsTask])
def test_rows_of_a_batch_are_those_of_the_whole(kind):
    task = kind(rows=6)
    assert isinstance(task, Task)
    whole = task.batches(3, 5)
    for name, part in task.batches(3, 5, slice(2, 4)).items():
        np.testing.assert_array_equal(part, whole[name][2:4])
    assert any((task.batches(3, 6)[name] != whole[name]).any() for name in whole)


SMALL = "--rows 8 --model.width 16 --model.depth 1 --validate-every 2 --log-every 1 --save-every 0 "
SMALL += "--no-tensorboard --no-plot --steps 3 "
RUNS = {
    "forecast": "--context 16 --horizon 3 --lags 4 --series inflation",
    "events": "--length 16 --sequences 40 --heldout 12 --mixture 2",
    "digits": "",
}
PRESETS = {"forecast": "forecast", "events": "events-hawkes", "digits": "digits-sequence"}


def args(name, folder, more=""):
    return f"--preset {PRESETS[name]} --run {folder} {SMALL} {RUNS[name]} {more}".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_trained_and_measured(name, folder, capsys):
    assert train.main(args(name, folder / name)) == 0
    said = capsys.readouterr().out
    out = folder / f"{name} measured"
    assert evaluate.main(["--checkpoint", str(folder / name), "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert all(np.isfinite(value) for value in found["heldout"].values())
    if name == "forecast":
        assert f"mse {found['heldout']['mse']:.4f}, mae {found['heldout']['mae']:.4f}" in said
        assert found["baselines"]["last value"]["mse"] > 0
    elif name == "events":
        assert f"{found['heldout']['loss']:7.4f} = " in said
        assert found["nats_per_event"]["model"] == pytest.approx(found["heldout"]["loss"], rel=1e-4)
        assert len(found["nats_by_place"]["the process itself"]) == 16
    else:
        assert f"{100 * found['heldout']['accuracy']:.1f}%" in said
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"forecast": {"forecast.png"}, "events": {"events.png"}}.get(name, set())


def test_three_steps_on_a_mesh_are_those_of_one_device(folder):
    """Of digits, whose batches have arrays of rows alone, and whose loss is of one token."""
    alone, spread = folder / "alone", folder / "spread"
    assert train.main(args("digits", alone)) == 0
    assert train.main([*args("digits", spread), "--mesh", "data=2,seq=2,tensor=2"]) == 0
    for one, other in zip(*map(metrics.read, (alone, spread)), strict=True):
        names = {"loss", "heldout_loss", "accuracy", "gradient_norm"} & one.keys()
        assert "loss" in names
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("forecast", "--context 200", "context=200 and horizon=3 leave no window in the training"),
        ("forecast", "--lags 0", "lags=0; it must be at least 1"),
        ("events", "--mixture 0", "mixture=0; it must be at least 1"),
        ("digits", "--rows 0", "rows=0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(name, more, says, tmp_path, capsys):
    assert train.main(args(name, tmp_path / "r", more)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("module", "read"),
    [
        ("statsmodels.datasets.macrodata", lambda: series.load("inflation")),
        ("sklearn.datasets", handwritten),
    ],
)
def test_a_missing_package_names_the_extra(module, read, monkeypatch):
    series.load.cache_clear()
    handwritten.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"missing: pip install 'scanax\[datasets\]'"):
        read()
