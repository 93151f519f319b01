"""lm-evaluation-harness over our models, with local tasks, data and metric: `make test-eval`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scanax.experiments import evaluate, harness
from scanax.experiments.answers import Answers
from scanax.experiments.datasets.text import DataConfig
from support import untrained
from support.compare import close

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [
    {"question": "two and two?", "choices": ["four", "five", "a lot"], "answer": 0},
    {"question": "blue or green?", "choices": ["green", "blue"], "answer": 1},
    {"question": "the first letter?", "choices": ["a", "b", "c", "d"], "answer": 0},
    {"question": "and the last?", "choices": ["zed", "zee"], "answer": 1},
]
TEXTS = ["some words about a few things\n", "b", "na\u00efve caf\u00e9s " * 20]
PROMPTS = ["the four", "blue skies", "a"]
COMMON = """
dataset_path: json
test_split: test
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
"""
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
""",
    "local_written": """
output_type: generate_until
doc_to_text: prompt
doc_to_target: wanted
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false, temperature: 0.0}}
metric_list:
  - {{metric: "{folder}/exact_match", hf_evaluate: true, aggregation: mean, higher_is_better: true}}
""",
    "broken_metric": """
output_type: generate_until
doc_to_text: prompt
doc_to_target: wanted
metric_list:
  - {{metric: "{folder}/nowhere", hf_evaluate: true, aggregation: mean, higher_is_better: true}}
""",
    "broken_option": """
output_type: generate_until
doc_to_text: prompt
doc_to_target: wanted
generation_kwargs: {{until: ["."], num_beams: 4}}
""",
    "broken_template": """
output_type: generate_until
doc_to_text: "{{{{missing.field}}}}"
doc_to_target: wanted
""",
    "broken_data": """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
""",
    "fixed_shots": """
output_type: multiple_choice
num_fewshot: 0
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
""",
}
# as the Hub's exact_match is written: a script that the library `evaluate` loads from its folder
METRIC = """
import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        same = [a == b for a, b in zip(predictions, references, strict=True)]
        return {"exact_match": sum(same) / len(same)}
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and the libraries' caches in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, offline):
    """A run, and tasks; of the texts to be written the first is what the model writes."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "text.txt").write_text("the four blue skies are four blue skies alone\n" * 4)
    untrained.save(folder / "run", data=DataConfig(paths=(str(folder / "text.txt"),)), length=16)
    answers = Answers(folder / "run")
    request = SimpleNamespace(args=(PROMPTS[0], {"until": ["\n\n"], "max_gen_toks": 6}))
    wanted = [*answers.generate_until([request]), "other", "else"]
    written = [{"prompt": p, "wanted": w} for p, w in zip(PROMPTS, wanted, strict=True)]
    data = {"local_choice": QUESTIONS, "local_text": [{"text": text} for text in TEXTS]}
    (folder / "exact_match").mkdir()
    (folder / "exact_match" / "exact_match.py").write_text(METRIC)
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        described = f"task: {name}\n" + (COMMON + text).format(folder=folder, name=name)
        (folder / "tasks" / f"{name}.yaml").write_text(described)
        if name != "broken_data":
            rows = data.get(name, QUESTIONS if name == "fixed_shots" else written)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def args(folder, tasks, *more):
    given = ["--checkpoint", str(folder / "run"), "--task-path", str(folder / "tasks")]
    return [*given, "--tasks", tasks, "--out", str(folder / "out"), *more]


def figures(folder):
    return json.loads((folder / "out" / "evaluation.json").read_text())["tasks"]["results"]


def test_figures_are_those_of_the_model_s_log_likelihoods(folder, capsys):
    assert evaluate.main(args(folder, "local_choice,local_text,local_written")) == 0
    found, answers = figures(folder), Answers(folder / "run")

    def score(context, text):
        return answers.loglikelihood([SimpleNamespace(args=(context, text))])[0][0]

    right, normed = [], []
    for row in QUESTIONS:
        context = f"Question: {row['question']}\nAnswer:"
        scores = np.array([score(context, f" {choice}") for choice in row["choices"]])
        lengths = np.array([len(choice) for choice in row["choices"]])
        right.append(scores.argmax() == row["answer"])
        normed.append((scores / lengths).argmax() == row["answer"])
    assert found["local_choice"]["acc,none"] == np.mean(right)
    assert found["local_choice"]["acc_norm,none"] == np.mean(normed)
    error = np.std(right, ddof=1) / len(right) ** 0.5
    close(np.array(found["local_choice"]["acc_stderr,none"]), np.array(error), 1e-6)

    total = sum(score("", text) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    bits, perplexity = -total / np.log(2) / size, np.exp(-total / words)
    close(np.array(found["local_text"]["bits_per_byte,none"]), np.array(bits), 1e-5)
    close(np.array(found["local_text"]["word_perplexity,none"]), np.array(perplexity), 1e-4)
    assert found["local_written"]["exact_match,none"] == pytest.approx(1 / 3)
    said = capsys.readouterr().out
    for name in ("acc_norm", "bits_per_byte", "exact_match", "Stderr"):
        assert name in said


@pytest.mark.parametrize("start", ["-m", "script"])
def test_started_either_way_the_metric_s_library_is_found(start, folder):
    """experiments/evaluate.py does not stand before the library `evaluate`."""
    script = str(ROOT / "experiments" / "evaluate.py")
    how = ["-m", "scanax.experiments.evaluate"] if start == "-m" else [script]
    command = [sys.executable, *how, *args(folder, "local_written", "--limit", "2")]
    cwd = ROOT / "experiments"  # where the file would be found first
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and figures(folder)["local_written"]["sample_len"] == 2
    assert figures(folder)["local_written"]["exact_match,none"] == 0.5


def test_text_and_tasks_are_measured_together_with_examples(folder):
    more = ["--shots", "2", "--limit", "1", "--lengths", "1", "--no-plot"]
    text = ["--data.paths", str(folder / "text.txt"), "--mesh", "data=2", "--emulate-devices", "8"]
    assert evaluate.main(args(folder, "local_ch*", *more, *text)) == 0
    results = json.loads((folder / "out" / "evaluation.json").read_text())
    assert results["tasks"]["n-shot"] == {"local_choice": 2}
    assert results["tasks"]["n-samples"]["local_choice"] == {"original": 4, "effective": 1}
    assert results["lengths"][0]["length"] == 16


def test_it_is_a_model_class_of_the_harness(folder):
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    made = harness.model_class()
    assert get_model("scanax") is made and harness.model_class() is made
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    given = {"model": "scanax", "model_args": f"checkpoint={folder / 'run'},step=2"}
    found = simple_evaluate(**given, tasks=["local_choice"], task_manager=manager, batch_size=3)
    assert evaluate.main(args(folder, "local_choice")) == 0
    assert (
        found["results"]["local_choice"]["acc,none"] == figures(folder)["local_choice"]["acc,none"]
    )


BAD = {
    "local_choise": "no task is called 'local_choise'; close ones: .*local_choice",
    "broken_metric": "broken_metric: the metric .*nowhere is not one of lm_eval's",
    "broken_option": "num_beams",
    "broken_template": "broken_template.*missing",
    "broken_data": "broken_data",
    "fixed_shots --shots 1": "shots=1, but task fixed_shots is one without examples",
    "local_text --shots 1": "shots=1, but task local_text is one without examples",
    "local_choice --task-path {folder}/none": "none' is no directory",
    ", --limit 1": "names none",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_wrong_task_is_one_line(flag, folder, capsys):
    tasks, *more = flag.format(folder=folder).split()
    out = ["--out", str(folder / "nothing")]
    assert evaluate.main([*args(folder, tasks), *more, *out]) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"evaluate: .*{BAD[flag]}.*", said[-1]) and "Traceback" not in said
    assert not (folder / "nothing").exists()


def test_a_file_that_is_no_task_is_named(folder, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("task: [mine\n")
    command = [*args(folder, "mine"), "--task-path", str(tmp_path)]
    assert evaluate.main(command) == 2
    assert re.search(r"'mine'.*mine\.yaml cannot be read", capsys.readouterr().err)
