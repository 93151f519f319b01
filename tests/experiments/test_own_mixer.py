"""docs/adding-a-mixer.md as it stands: its class trains, decodes, shards and obeys the laws."""

import functools
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scanax import selftest
from scanax.experiments import generate, metrics, train
from scanax.layers import laws
from scanax.models import LM, LMConfig, by_layer, from_layers, split
from scanax.models.partition import specs
from support.compare import close
from support.runs import args

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-mixer.md"
NOTEBOOK = ROOT / "notebooks" / "1_one_combine_four_schedules.ipynb"
(CODE,) = re.findall(r"```python\n(# mingru\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
LISTED = """        self.v = nnx.List([linear(), linear()])

    def __call__"""
NAME = "mingru:MinGRU"


@pytest.fixture(scope="session", autouse=True)
def mingru(tmp_path_factory):
    """The page's class, in a file where Python finds it; one class in a process by that name."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mingru.py").write_text(CODE)
    (folder / "narrow.py").write_text(CODE.replace("*, depth, ", "*, "))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def test_it_obeys_the_laws(capsys):
    assert selftest.main(["--mixer", NAME]) == 0
    out = capsys.readouterr().out
    for law in (*laws.LAWS, "devices change nothing", "parameters have places"):
        (row,) = [line for line in out.splitlines() if line[:26].rstrip() == law]
        assert row.endswith("ok"), row


def test_a_mixer_that_is_wrong_is_found(mingru, capsys):
    """One that never forgets at a reset."""
    code = (mingru / "mingru.py").read_text()
    (mingru / "leaks.py").write_text(code.replace("reset=reset)", "reset=None)"))
    assert selftest.main(["--mixer", "leaks:MinGRU"]) == 1
    rows = capsys.readouterr().out.splitlines()
    verdicts = {row[:26].strip(): row[38:] for row in rows}
    assert verdicts["packed is alone"].startswith("OVER ITS BAR")
    assert verdicts["devices change nothing"] == "ok"


def test_it_trains_over_devices_as_on_one_and_generates(texts, tmp_path, capsys):
    losses = {}
    for over in ("", "seq=2,tensor=2"):
        more = f"--model.pattern {NAME} --steps 4 --stream-state "
        flags = args(texts, tmp_path / (over or "alone"), more)
        assert train.main([*flags, *(["--mesh", over] if over else [])]) == 0
        losses[over] = np.array([row["loss"] for row in metrics.read(tmp_path / (over or "alone"))])
    close(losses["seq=2,tensor=2"], losses[""], 1e-5)
    capsys.readouterr()
    prompt = ["--prompt", "the ", "--tokens", "5", "--temperature", "0"]
    assert generate.main(["--checkpoint", str(tmp_path / "alone"), *prompt]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_a_parameter_of_another_name_is_placed_by_the_class(mingru):
    """Without that it is an error that says so."""
    code = (mingru / "mingru.py").read_text().replace("self.v", "self.content")
    places = '    places = {r"content\\.(kernel|bias)": jax.P("fsdp")}\n\n    def __call__'
    for name, text in (("placeless", code), ("placed", code.replace("    def __call__", places))):
        (mingru / f"{name}.py").write_text(text)
    found = {}
    for name in ("placeless", "placed"):
        config = LMConfig(vocab=16, width=8, depth=1, pattern=f"{name}:MinGRU")
        _, params, _ = split(nnx.eval_shape(lambda c=config: LM(c, rngs=nnx.Rngs(0))))
        found[name] = functools.partial(specs, config, params)
    with pytest.raises(ValueError, match=r"the parameter mingru.content.\w+ lies; a mixer of your"):
        found["placeless"]()
    mixer = found["placed"]()["blocks"][0]["mixer"]
    assert mixer["content"]["kernel"] == jax.P("pipe", "fsdp")
    assert mixer["gate"]["kernel"] == jax.P("pipe", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere:Mixer", "'nowhere:Mixer' cannot be imported: No module named 'nowhere'; the "),
        ("mingru:Other", "mingru has no class Other with __call__(x, state, reset) and init_state"),
        ("mingru:partial", "mingru has no class partial with __call__"),
        ("narrow:MinGRU", "is built as MinGRU(width, depth=, dtype=, param_dtype=, rngs=): got"),
    ],
)
def test_a_mixer_that_is_not_there_is_said_in_a_line(name, says, texts, tmp_path, capsys):
    assert selftest.main(["--mixer", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert train.main([*args(texts, tmp_path / "r", f"--model.pattern {name} "), "--no-plot"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("train: ") and says in line
    assert not (tmp_path / "r").exists()


def test_one_name_is_one_class(mingru):
    """Programs that were compiled for the first would be taken for the second."""
    code = (mingru / "mingru.py").read_text()
    (mingru / "edited.py").write_text(code)
    config = LMConfig(vocab=16, width=8, depth=1, pattern="edited:MinGRU")
    nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    importlib.reload(sys.modules["edited"])
    with pytest.raises(ValueError, match="'edited:MinGRU' was another class before"):
        LM(config, rngs=nnx.Rngs(0))


def test_a_list_of_modules_is_saved_and_read_back(mingru):
    code = (mingru / "mingru.py").read_text()
    code = code.replace(
        "self.v, self.out = linear(), linear(), linear()", "self.out = linear(), linear()"
    )
    code = code.replace("    def __call__", LISTED, 1).replace("self.v(x)", "self.v[1](x)")
    (mingru / "listed.py").write_text(code)
    config = LMConfig(vocab=16, width=8, depth=2, pattern="listed:MinGRU")
    _, params, _ = split(LM(config, rngs=nnx.Rngs(0)))
    read = from_layers(config, by_layer(config, params))
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_notebook_has_the_pages_class(mingru):
    """Its comments aside."""
    (cell,) = (
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if "%%writefile mingru.py" in "".join(cell["source"])
    )
    plain = [re.sub(r"  # .*", "", text).strip() for text in (cell, CODE)]
    assert plain[0].splitlines()[1:] == plain[1].splitlines()[1:]
