"""Measurements replace their own part of results.md only; runs are not trained twice."""

import json
import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scanax.experiments import flags, processes, reproduce, results, sections, trained
from scanax.experiments.config import to_json
from scanax.experiments.results import (
    aaren,
    decode,
    language,
    lightning,
    recall_copying,
    recall_induction,
    recall_mqar,
    video,
    vision,
)
from scanax.experiments.tasks.recall import LENGTHS
from support.runs import SMALL

STATIC = "# Results\n\nBefore.\n\n<!-- lightning -->\nof before\n<!-- /lightning -->\n\n## After\n"


def made(name, **more):
    """What a measurement leaves, of one row."""
    about = {"claim": f"{name} is so.", "found": "it is", "command": f"python {name}"}
    about |= {"machine": "a core", "seconds": 61, "date": "2026-01-02", "seeds": [0, 1, 2]}
    return {"name": name, "columns": ["what", "time (s)"], "rows": [["a", 0.123456]]} | about | more


def test_the_list_has_the_name_and_the_claim_of_each(capsys):
    assert reproduce.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == results.names()
    assert all("arXiv:" in line and line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "name what to measure: "),
        ("lightening --out OUT", "experiment 'lightening' is not one of "),
        ("lightning --small", "--small measures nothing: name another place for it with --out"),
        ("lightning --out OUT/none", "OUT/none; name one with --out DIR"),
        ("lightning --seeds 0 0 --out OUT", "--seeds (0, 0): one or more are needed, each once"),
        ("lightning --jobs 0 --out OUT", "--jobs 0: from 1 to the "),
        ("lightning --redraw --out OUT", "--redraw: there is no OUT/results/lightning.json"),
        ("lightning --sizes 3 --out OUT", "--sizes"),
    ],
)
def test_a_wrong_flag_is_said_in_a_line(flags, says, tmp_path, capsys):
    assert reproduce.main(flags.replace("OUT", str(tmp_path)).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reproduce: ") and says.replace("OUT", str(tmp_path)) in line
    assert not list(tmp_path.iterdir())


def test_small_sizes_of_the_cheap_ones(tmp_path, capsys):
    """The section is replaced, a new one stands beside it, the text around both is as it was."""
    (tmp_path / "results.md").write_text(STATIC)
    flags = ("--small", "--seeds", "0", "1", "--out", str(tmp_path))
    assert reproduce.main(["lightning", "decode", *flags]) == 0
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Results\n\nBefore.\n") and text.endswith("\n\n## After\n")
    assert "of before" not in text
    for name in ("lightning", "decode"):
        (picture,) = tmp_path.glob(f"results/{name}.png*")
        assert picture.read_bytes().startswith(b"\x89PNG")
        found = json.loads((tmp_path / f"results/{name}.json").read_text())
        assert found.keys() >= {"machine", "seconds", "date", "command", "columns", "rows"}
        assert all(len(row) == len(found["columns"]) for row in found["rows"])
        assert all(x > 0 for row in found["rows"] for x in row if not isinstance(x, str))
        assert text.count(f"<!-- {name} -->") == 1 and f"](results/{name}.png)" in text
        assert text.count(f"| [{name}](#{name}) | {found['claim']} |") == 1
    assert text.index("<!-- decode -->") < text.index("<!-- lightning -->")
    assert reproduce.main(["decode", "--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.md").read_text() == text


# what runs leave, of every task at once
LEFT = {"step": 2, "seconds": 3.0, "parameters": 100, "exact": 0.5, "loss": 1.25, "mse": 0.9}
LEFT |= {"bits_per_byte": 2.5, "accuracy": 0.75}
SHARES = {"item": range(1, 5), "length": LENGTHS, "pairs": [1, 2, 4]}
EVALUATED = {
    "heldout": LEFT,
    "state_bytes": 64,
    "early_exit": [{"patches": n, "accuracy": n / 16} for n in range(4, 17, 4)],
    "rollout": {
        "mse": {
            name: [0.01 * h for h in range(1, 17)]
            for name in ("model", "the last frame, copied", "the mean of all frames")
        }
    },
} | {f"by_{x}": [{x: n, "accuracy": 0.5} for n in ns] for x, ns in SHARES.items()}


@pytest.mark.parametrize("name", sorted({*results.names()} - {"decode", "lightning"}))
def test_rows_of_runs_that_train(name, tmp_path, monkeypatch):
    """Each run's ends stand in its row; what is timed besides is timed at small sizes."""
    asked = []

    def run(jobs, at_once=1, ended=None):
        for job in jobs:
            asked.append(job.module)
            folder = job.log.with_suffix("")
            config = flags.train(list(job.arguments)) if job.module == "train" else None
            if config is not None:  # as the run itself would: what cannot be built is said
                nnx.eval_shape(lambda task=config.task: task.build(nnx.Rngs(0)))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "evaluation.json").write_text(json.dumps(EVALUATED))
            (folder / "film.png").write_bytes(folder.name.encode())
            (folder / "final.json").write_text(json.dumps(LEFT))
            held = {f"heldout_{k}": x for k, x in LEFT.items()}
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 2} | held) + "\n")
            if config is not None:
                (folder / "config.json").write_text(json.dumps(to_json(config)))
            if ended:
                ended(job)

    monkeypatch.setattr(processes, "run", run)
    assert reproduce.main([name, "--small", "--seeds", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"results/{name}.json").read_text())
    assert "train" in asked and all(len(row) == len(found["columns"]) for row in found["rows"])
    trained_, evaluated = asked.count("train"), asked.count("evaluate")
    assert evaluated in (0, trained_) and len(found["rows"]) <= trained_
    ends = {2.5, 75.0, 0.75, 0.25, 0.9, 1.25, 50.0, 0.01}
    assert all(ends & {x for x in row if isinstance(x, float)} for row in found["rows"])
    assert (tmp_path / f"results/{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results.md").read_text()
    assert found["found"] in text
    for label, copy in found["pictures"].items():
        assert f"\n{label}:\n\n![{label}](results/{copy})" in text
        assert (tmp_path / "results" / copy).read_text() == f"{label.lower()}-3"
    assert len(found["pictures"]) == (3 if name == "video" else 0)
    assert reproduce.main([name, "--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.md").read_text() == text


@pytest.mark.parametrize("broken", ["<!-- lightning -->", "<!-- /lightning -->"])
def test_damaged_markers_are_said_before_anything_runs(broken, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "measure", lambda *_: pytest.fail("it was measured"))
    for text in (STATIC.replace(broken, ""), STATIC + broken):
        (tmp_path / "results.md").write_text(text)
        assert reproduce.main(["decode", "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("reproduce: the markers of lightning are damaged: ")
        assert (tmp_path / "results.md").read_text() == text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("the disk is full")])
def test_what_fails_leaves_what_was_there(error, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    (tmp_path / "results").mkdir()
    old = json.dumps(made("decode"))
    (tmp_path / "results" / "decode.json").write_text(old)
    (tmp_path / "results.md").write_text(STATIC)
    broken = results.Experiment("A claim.", lambda _: made("decode"), fail)
    monkeypatch.setattr(results, "find", lambda _: broken)
    assert reproduce.main(["decode", "--out", str(tmp_path)]) in (1, 2)
    assert (tmp_path / "results.md").read_text() == STATIC
    assert (tmp_path / "results" / "decode.json").read_text() == old


def test_sections_stand_in_the_order_of_the_names():
    names, text = ("a", "b", "c"), ""
    for name in "cab":
        text = sections.updated(text, [made(name)], names)
    places = [text.index(f"<!-- {name} -->") for name in ("summary", *names)]
    assert places == sorted(places)
    assert "`python b`: a core; seeds 0 1 2; 1 min 1 s, 2026-01-02." in text
    assert "| a | 0.123 |" in text
    crossed = "<!-- a --><!-- b --><!-- /a --><!-- /b -->"
    with pytest.raises(ValueError, match="of a are damaged: b begins between them"):
        sections.spans(crossed, names)


def test_cells_have_three_digits():
    cells = [None, 1234567, 123456.0, 99.96, 0.00012345, "a|b"]
    assert [sections.cell(x) for x in cells] == [
        "",
        "1,234,567",
        "123,000",
        "100",
        "0.000123",
        "a\\|b",
    ]


def test_the_three_forms_compute_the_same():
    q, k, v, log_decay = lightning.inputs(0, 1, 33, lightning.LIGHTNING)
    want = np.zeros((1, 33, lightning.HEADS, lightning.WIDTH))
    state = np.zeros((1, lightning.HEADS, lightning.WIDTH, lightning.WIDTH))
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    for t in range(33):
        state = state * np.exp(lightning.LIGHTNING)[:, None, None]
        state = state + k64[:, t, :, :, None] * v64[:, t, :, None, :]
        want[:, t] = np.einsum("bhk,bhkv->bhv", q64[:, t], state)
    for form in (lightning.chunkwise, lightning.states, lightning.matrix):
        y = jax.jit(form)(q, k, v, log_decay)
        assert y.dtype == jnp.float32
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()


def test_models_of_equal_parameters(monkeypatch):
    """MLPs make up for what mixers lack; models that cannot be made equal are refused."""
    chosen = {name: language.MODELS[name] for name in ("Mamba", "Mamba-2", "RetNet", "attention")}
    monkeypatch.setattr(language, "MODELS", chosen)
    sizes = [trained.parameters(trained.task_of(given)) for given in language.sized().values()]
    assert len(sizes) == 4 and max(sizes) / min(sizes) < 1.03
    monkeypatch.setattr(language, "WITHIN", 0.001)
    with pytest.raises(ValueError, match=r"Mamba-2 has 855,508 parameters, not within 0.1% of"):
        language.sized()


def test_runs_are_trained_once_and_go_on(texts, tmp_path, monkeypatch):
    """A run at its end is not trained again, of other flags refused, a stopped one goes on."""
    given = f"--preset stdlib --data.paths {texts} {SMALL} --steps 2".split()
    folder, jobs, real = tmp_path / "runs" / "small-1", [], processes.run

    def run(some, at_once=1, ended=None):
        jobs.extend(some)
        real(some, at_once)

    monkeypatch.setattr(processes, "run", run)
    found = trained.all_trained([trained.Run(tuple(given), 1, folder)])[0]
    assert found["step"] == 2 and found["bits_per_byte"] > 0 and found["parameters"] > 1000
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 1 and len(jobs) == 1 and jobs[0].module == "train"
    run = trained.Run(tuple(given), 1, folder)
    assert trained.all_trained([run]) == [found] and len(jobs) == 1
    with pytest.raises(ValueError, match=r"small-1 holds another run: .*width is 32, was 16"):
        trained.all_trained([run._replace(flags=(*given, "--model.width", "32"))])
    (folder / "final.json").unlink()
    job = trained.remaining(run)
    assert job is not None and job.arguments == ("--resume", "--run", str(folder))


def test_an_evaluation_is_kept_until_its_run_goes_on(tmp_path, monkeypatch):
    done = []

    def run(jobs, at_once=1, ended=None):
        for job in jobs:
            done.append(job.arguments)
            (tmp_path / "evaluation.json").write_text(json.dumps({"number": len(done)}))
            ended(job)

    def evaluated():
        return trained.all_evaluated([tmp_path])[0]["number"]

    monkeypatch.setattr(processes, "run", run)
    (tmp_path / "final.json").write_text("{}")
    config = flags.train(["--preset", "digits-sequence", "--run", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert [evaluated(), evaluated()] == [1, 1]
    assert done == [("--checkpoint", str(tmp_path))]
    later = (tmp_path / "evaluated.json").stat().st_mtime_ns + 1
    os.utime(tmp_path / "final.json", ns=(later, later))
    assert [evaluated(), evaluated()] == [2, 2]
    monkeypatch.setattr(trained, "file_digest", lambda _: "the task was changed")
    assert [evaluated(), evaluated()] == [3, 3]
    (tmp_path / "evaluated.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluated.json is no JSON: .*; remove it"):
        evaluated()


def test_a_run_that_diverged_is_named(tmp_path, monkeypatch):
    ends = [{"step": 2, "loss": 1.5}, {"step": 2, "loss": float("nan")}]
    monkeypatch.setattr(trained, "all_trained", lambda runs, at_once: ends[: len(runs)])
    models = {"A, small": ["--steps", "2"]}
    (ended,) = trained.each_seed(models, [3], tmp_path, evaluate=False).values()
    run = trained.Run(("--steps", "2"), 3, tmp_path / "a-small-3")
    assert ended == [trained.Ended(run, ends[0], {})]
    with pytest.raises(ValueError, match=r"a-small-4: loss is nan: nothing to compare"):
        trained.each_seed(models, [3, 4], tmp_path, evaluate=False)


def test_figures_that_lack_what_is_drawn_are_named(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    file = tmp_path / "results/recall-induction.json"
    whole = json.dumps(made("recall-induction", curves={}))
    for text, says in (
        ("{", f"{file} is no JSON: Expecting property name"),
        ('{"name": "recall-induction"}', f"{file} lacks 'claim': it is of another version; "),
        (whole, f"{file} lacks 'Mamba': it is of another version; measure it anew"),
    ):
        file.write_text(text)
        assert reproduce.main(["recall-induction", "--redraw", "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"reproduce: {says}") and file.read_text() == text
        (tmp_path / "results/recall-induction.json.new").unlink(missing_ok=True)


def test_a_process_that_fails_is_said_by_its_last_line(tmp_path):
    job = processes.Job("a/b-0", "train", ("--steps", "0"), tmp_path / "b-0.log")
    with pytest.raises(ValueError, match=r"^a/b-0 ended with status 2: train: .*steps=0.*b-0.log"):
        processes.run([job])


def test_mean_and_spread():
    assert trained.mean_and_spread([1.0]) == (1.0, None)
    assert trained.mean_and_spread(iter([1.0, 2.0, 6.0])) == (3.0, statistics.stdev([1, 2, 6]))
    assert trained.shown(98.44, 0.26, 1) == "98.4 ± 0.3" and trained.shown(2.0, None, 2) == "2.00"
    assert trained.averaged([[(1.0, 2.0)], [(1.0, 4.0)]]) == [[1.0, 3.0, 2**0.5]]
    with pytest.raises(ValueError, match="not measured at the same places"):
        trained.averaged([[(1.0, 2.0)], [(2.0, 2.0)]])


def test_a_read_context_is_the_tokens_read_one_by_one(monkeypatch):
    """The pieces a context is read by leave the state that single steps leave."""
    monkeypatch.setattr(decode, "CHUNK", 4)
    sizes = []

    def step(_, tokens, state):
        sizes.append(tokens.shape[1])
        return tokens[:, -1:], state + [int(t) for t in tokens[0]]

    tokens = jnp.arange(14, dtype=jnp.int32)[None]
    following, state = decode.read(decode.Decoder(None, step), tokens, [], 2)
    assert sizes == [2, 4, 4, 4] and state == list(range(14)) and int(following[0, 0]) == 13


def test_language_says_first_what_gla_is_behind():
    rows = [["Mamba", 2.0, 0.01], ["attention", 2.1, 0.3], ["GLA", 2.2, 0.1]]
    assert language.answer(rows) == (
        "does not hold for GLA beside Mamba: held-out bits per byte, best first, are "
        "Mamba 2.00 ± 0.01, attention 2.10 ± 0.30, GLA 2.20 ± 0.10"
    )
    rows[2][1] = 2.05
    assert language.answer(rows).startswith("holds: held-out bits per byte, best first, are ")


def test_answers_begin_with_what_does_not_hold():
    def begins(answer, what):
        return answer.startswith(f"does not hold for {what}: " if what else "holds: ")

    assert results.verdict(["a", "b", "c"]) == "does not hold for a, b and c: "
    for right, without, what in [
        (96.0, 49.0, ""),
        (94.0, 49.0, "M (under 95 % right)"),
        (94.0, 50.0, "M (under 95 % right) and W (at least 50 % right)"),
    ]:
        rows = [["M", right, 1.0], ["W", without, None]]
        assert begins(recall_copying.answer(rows), what)
    curves = {"Mamba": [[64.0, 100.0, 0.0], [128.0, 91.0, 0.0], [256.0, 90.0, 0.0]]}
    rows = [["Mamba", *[90.0] * 4], ["GLA", *[10.0] * 4]]
    assert begins(recall_induction.answer(rows, curves), "")
    curves["Mamba"][1][1] = 89.0
    what = "rows of 128 tokens and more (Mamba under 90 % right)"
    assert begins(recall_induction.answer(rows, curves), what)
    rows = [
        [name, "", n, y]
        for name in results.MIXER_NAMES.values()
        for n, y in ((9, 20.0), (18, 80.0))
    ]
    assert begins(recall_mqar.answer(rows), "")
    rows[1][3], rows[3][3], rows[3][2] = 24.0, 24.0, 17  # RetNet's state has not doubled
    assert begins(recall_mqar.answer(rows), "GLA")
    rows = [
        [name, 9.0, 1.0, *[0.1] * 4, 0.0, 2.0, 2.0] for name in ("ConvS5", "ConvLSTM", "attention")
    ]
    assert begins(video.answer(rows, 0.1), "")
    rows[0][6] = 0.11
    assert begins(video.answer(rows, 0.1), "roll-outs of 64 frames")
    rows = [[form, n, 1, 1.0, 100.0] for form in lightning.FORMS for n in (256, 512)]
    assert begins(lightning.answer(rows), "")
    rows[1][4] = 85.0
    assert begins(lightning.answer(rows), "rows of 512 tokens")
    rows = [[m, n, 9.0, 1.0, 1.0, 0.0, 4.0] for m in ("GLA", "attention") for n in (64, 128, 256)]
    assert begins(decode.answer(rows), "")
    rows[1][4] = 1.2
    assert begins(decode.answer(rows), "GLA")
    rows = [
        [name, n, 98.0 if n == 64 else None, 1.0, 9, 6.4e5 / n, 6.4e5 / n, 1.0, 1.0, 1.0]
        for name in vision.MODELS
        for n in (64, 256)
    ]
    assert begins(vision.answer(rows), "")
    rows[0][2], rows[1][6] = 96.9, 1e3
    assert begins(vision.answer(rows), "accuracy and the speed of training")
    rows = [
        [name, aaren.WHAT[what], 1.0, 0.0, 1.0, 0.0, 1.02]
        for name, (_, what) in aaren.TASKS.items()
    ]
    curves = {
        f"{what} of {m}": [[64.0, 1.0], [128.0, 1.0]]
        for what in ("state", "time")
        for m in aaren.MIXERS
    }
    assert begins(aaren.answer(rows, curves), "")
    rows[1][6], curves["state of aaren"][1][1] = 1.03, 2.0
    assert begins(aaren.answer(rows, curves), "co2 and the state")
