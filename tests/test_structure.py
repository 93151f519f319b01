"""The rules of the tree that no type checker sees."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "sharding", "layers", "models", "experiments")  # each imports to its left
LIBRARY = [path for folder in LAYERS for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
TESTS = sorted(ROOT.glob("tests/**/*.py"))
SCRIPTS = [
    p for p in sorted(ROOT.glob("experiments/*.py")) if '__name__ == "__main__"' in p.read_text()
]


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """(line, module's parts from the tree's top or None if foreign, whether relative)."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name.split("."), 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            found = [([*base, alias.name], node.level) for alias in node.names]
        else:
            continue
        for parts, level in found:
            if level:
                yield node.lineno, (*package[: len(package) - level + 1], *parts), True
            elif parts[0] == "scanax":
                yield node.lineno, tuple(parts[1:]), False
            else:
                assert parts[0] not in LAYERS, (
                    f"{name_of(path)}:{node.lineno}: not by scanax's name"
                )


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_point_one_way(path):
    own = LAYERS.index(path.relative_to(ROOT).parts[0])
    for line, parts, relative in imports(path):
        where = f"{name_of(path)}:{line}"
        assert parts and parts[0] in LAYERS, f"{where} imports the whole tree"
        assert LAYERS.index(parts[0]) <= own, f"{where} imports {'.'.join(parts)}"
        assert relative or LAYERS[own] == "experiments", f"{where}: the library's are relative"


def test_the_top_level_imports_nothing_heavy():
    code = "import sys, scanax; assert not {'jax', 'scanax.experiments'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_is_loaded_twice():
    """All are named scanax..., pytest's conftest and test files aside."""
    expected = {}
    for path in LIBRARY:
        parts = path.relative_to(ROOT).with_suffix("").parts
        expected[path] = ".".join(part for part in ("scanax", *parts) if part != "__init__")
        importlib.import_module(expected[path])
    loaded = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    names = {(Path(file).resolve(), name) for name, file in loaded if file}
    assert {(path, name) for path, name in names if path in expected} == set(expected.items())


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_script_explains_itself_and_hides_no_library(script, tmp_path):
    """Its own folder is not on the path: experiments/evaluate.py is no library named evaluate."""
    code = (
        "import runpy, sys\n"
        f"sys.argv, folder = [{str(script)!r}, '--help'], {str(script.parent)!r}\n"
        "sys.path.insert(0, folder)\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "assert folder not in sys.path\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [*LIBRARY, ROOT / "selftest.py", *TESTS], ids=name_of)
def test_file_is_short_and_clean(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert path.stem not in ("utils", "helpers", "common", "misc")
    pictures = re.findall("[\u2600-\u27bf\U0001f000-\U0001faff]", text)
    assert not pictures
    if path in LIBRARY:
        assert not re.findall(r"\b(nan_to_num|TODO|FIXME|XXX)\b", text)
        assert not re.findall(r"[\"' ](/home/|/root/|/Users/)", text)


def call():
    from scanax.kernels import linear_attention

    x = jnp.zeros((1, 4, 2, 3), jnp.float32)
    linear_attention(x, x[:, :3], x, jnp.zeros(2, jnp.float32))


def test_signatures_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_unchecked_shows_our_own_error(unchecked):
    with pytest.raises(ValueError, match="differ in batch or length"):
        call()


def test_the_readme_names_every_paper():
    """Those that docstrings and comments of the library take something from."""
    cited = {n for path in LIBRARY for n in re.findall(r"arXiv:(\d{4}\.\d{5})", path.read_text())}
    named = set(re.findall(r"\b\d{4}\.\d{5}\b", (ROOT / "README.md").read_text()))
    assert len(cited) > 40
    mine = {"2410.01201"}  # minGRU, of which docs/adding-a-mixer.md makes a mixer
    assert named == cited | mine
