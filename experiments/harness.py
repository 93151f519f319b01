"""lm-evaluation-harness's tasks over a trained model, its model class "scanax" (extra `eval`)."""

import difflib
import functools
import importlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from .answers import Answers

DRAWS = 1000  # of a bootstrap, where the standard error of a metric has no formula
SEEDS = 0, 1234, 1234  # of random, numpy and examples: the harness's own
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def package(name: str) -> Any:
    """A module of lm_eval; ValueError that says what to install where there is none."""
    # its bootstrap would fork a process that runs JAX
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        return importlib.import_module(f"lm_eval{name}")
    except ImportError as error:
        missing = error.name or "lm_eval"
        raise ValueError(
            f"--tasks needs the package {missing}: pip install 'scanax[eval]'"
        ) from None


@functools.cache
def model_class() -> type[Answers]:
    """`Answers` as a model class of lm_eval, which also finds it by the name "scanax"."""
    made = type("Scanax", (Answers, package(".api.model").LM), {"__doc__": Answers.__doc__})
    return package(".api.registry").register_model("scanax")(made)


def find(names: str, path: str | None, shots: int | None) -> Any:
    """The tasks (or groups, tags, patterns) of these names, their data and metrics loaded.

    ValueError in one line for what is not there or does not go together.
    """
    package("")
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"task_path={path!r} is no directory")
    manager = package(".tasks").TaskManager(include_path=path)
    chosen = []
    for name in filter(None, map(str.strip, names.split(","))):
        found = manager.match_tasks([name])
        if not found:
            raise ValueError(f"no task is called {name!r}{close(name, manager, path)}")
        chosen += found
    if not chosen:
        raise ValueError(f"tasks={names!r} names none")
    try:
        tasks = manager.load(list(dict.fromkeys(chosen)))
    except Exception as error:  # of a task's YAML, code, packages, data or the network
        raise ValueError(f"tasks={names!r}: {line(error)}") from None
    for name, task in tasks["tasks"].items():
        prepare(name, task, shots)
    return tasks


def prepare(name: str, task: Any, shots: int | None) -> None:
    """Set the number of examples; refuse what the harness would ignore or fail at later."""
    kind, own = task.OUTPUT_TYPE, task.get_config("num_fewshot")
    if shots and (own == 0 or kind == "loglikelihood_rolling"):
        raise ValueError(f"shots={shots}, but task {name} is one without examples")
    task.set_config("num_fewshot", (own or 0) if shots is None else shots)
    task.set_fewshot_seed(SEEDS[2])
    if kind == "generate_until" and not callable(task.get_config("process_results")):
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise ValueError(
                    f"task {name}: the metric {metric} is not one of lm_eval's, and the library "
                    "evaluate does not find it"
                )


def close(name: str, manager: Any, path: str | None) -> str:
    """What else may have been meant, and which files of the user's cannot be read as tasks."""
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    said = f"; close ones: {', '.join(near)}" if near else "; nor is one close"
    for file in sorted(Path(path).glob("**/*.yaml")) if path is not None else ():
        try:
            package(".tasks._yaml_loader").load_yaml(file, resolve_func=False)
        except Exception as error:
            said += f"; {file} cannot be read: {line(error)}"
    return said


def measure(tasks: Any, answers: Any, limit: int | None) -> dict[str, Any]:
    """The harness's figures of these tasks, printed and returned."""
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    try:
        evaluate = package(".evaluator").evaluate
        found = evaluate(answers, tasks, limit=limit, bootstrap_iters=DRAWS, log_samples=False)
    except (ValueError, OSError) as error:
        raise ValueError(line(error)) from None
    except Exception as error:
        if answers.busy:
            raise
        raise ValueError(f"tasks {', '.join(tasks['tasks'])}: {line(error)}") from None
    utils = package(".utils")
    for column in ("results", "groups"):
        if found.get(column):
            print(f"\n{utils.make_table(found, column)}", flush=True)
    kept = {name: found[name] for name in KEPT if name in found}
    kept["lm_eval"] = package("").__version__
    return json.loads(json.dumps(kept, default=utils.handle_non_serializable))


def line(error: Exception) -> str:
    """What an error says, in one line."""
    said = " ".join(str(error).split())
    plain = isinstance(error, ValueError | OSError) and said
    return said if plain else f"{type(error).__name__}: {said}"
