"""The wheel holds the whole library and nothing else, and every module of it can be imported."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("__init__.py", "selftest.py")
FOLDERS = ("kernels", "sharding", "layers", "models", "experiments")

IMPORT_ALL = """
import importlib, pkgutil, sys, scanax
for module in pkgutil.walk_packages(scanax.__path__, "scanax."):
    importlib.import_module(module.name)
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "scanax":
        print(name, module.__file__)
"""


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because setuptools leaves its build folder in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "*.npz"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, folder / "tree")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    code = {
        *map(Path, TOP),
        *(p.relative_to(ROOT) for f in FOLDERS for p in ROOT.glob(f"{f}/**/*.py")),
    }
    assert {name for name in held if name.endswith(".py")} == {f"scanax/{p}" for p in code}
    others = {name for name in held if not name.endswith(".py") and ".dist-info/" not in name}
    assert others == {"scanax/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def test_every_module_is_imported_from_outside_the_tree(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The dependencies are this environment's; a path in a .pth file does not bring its own .pth
    # files, so that an editable scanax beside them is not seen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    printed = run(python, "-c", IMPORT_ALL, cwd=tmp_path, env=clean)
    modules = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert all(Path(file).is_relative_to(site) for file in modules.values()), modules
    assert len(modules) == len(TOP) + sum(1 for f in FOLDERS for _ in ROOT.glob(f"{f}/**/*.py"))
