"""Every notebook runs from top to bottom on a CPU, and what is stored of it is such a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
SECONDS = 180
ELSEWHERE = re.compile(r"(?<![\w.:/])/(home|root|tmp|var|usr|opt|mnt|work|workspace|Users)/")


class Kernel(AsyncKernelManager):
    """The Python of the tests, whichever kernels are installed."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def read(path):
    return nbformat.read(path, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def said(book, *kinds):
    """All text of the outputs of these kinds."""
    outputs = [output for cell in code(book) for output in cell.outputs]
    texts = [o.text for o in outputs if o.output_type == "stream" and o.name in kinds]
    data = [o.data for o in outputs if "data" in o and "data" in kinds]
    return "\n".join(texts + [each["text/plain"] for each in data])


def sound(book):
    """The rows of tables of checks, by name."""
    return [row[:26].rstrip() for row in said(book, "stdout").split("\n") if row.endswith(" ok")]


def files():
    """What lies beside the notebooks, and at the top of the repository."""
    return {path for folder in (ROOT, ROOT / "notebooks") for path in folder.iterdir()}


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_leaves_nothing_behind(path, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    work = tmp_path / "work"
    work.mkdir()
    before, book = files(), read(path)
    where = {"metadata": {"path": str(work)}}
    # an error in a cell is raised, with its traceback
    NotebookClient(
        book, kernel_manager_class=Kernel, timeout=SECONDS, startup_timeout=SECONDS, resources=where
    ).execute()
    assert files() <= before
    assert sound(book) == sound(read(path))
    assert "Warning" not in said(book, "stderr")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_a_clean_run(path):
    assert path.stat().st_size < 400_000
    book = read(path)
    nbformat.validate(book)
    assert book.nbformat_minor >= 5 and book.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Warning" not in said(book, "stdout", "stderr", "data")
    for text in (said(book, "stdout", "stderr", "data"), *(cell.source for cell in book.cells)):
        assert not ELSEWHERE.search(text)
        assert "\x1b" not in text and "\r" not in text
    assert max(cell.source.count("\n") for cell in code(book)) <= 30


def installing(path):
    """The first cell of code, which installs where scanax cannot be imported."""
    return compile(code(read(path))[0].source, path.name, "exec")


def pretend(monkeypatch, listed):
    """No scanax, and a pip that lists these packages; returns what it is told."""
    told = []

    def run(command, **_):
        told.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=listed)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    monkeypatch.setattr(subprocess, "run", run)
    return told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_installs_beside_the_jax_that_is_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jax = ["jax==0.10.2", "jax-cuda12-plugin==0.10.2", "jaxlib==0.10.2+cuda", "libtpu==0.0.40"]
    told = pretend(monkeypatch, "\n".join(["flax==0.1", *jax, "jaxtyping==0.1", "numpy==2.0"]))
    exec(installing(path), {})
    install = told[-1]
    assert install[:4] == [sys.executable, "-m", "pip", "install"]
    assert install[-1].startswith("scanax[") and install[-1].endswith("/scanax/scanax")
    kept = Path(install[install.index("--constraint") + 1])
    assert kept.read_text().split() == jax


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_refuses_a_jax_that_is_too_old(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = pretend(monkeypatch, "jax==0.10.1\njaxlib==0.10.1\n")
    with pytest.raises(SystemExit, match=r"^jax==0\.10\.1 .*0\.10\.2[^\n]*$"):
        exec(installing(path), {})
    assert "install" not in told[-1] and not list(tmp_path.iterdir())


def test_the_links_name_their_own_notebook():
    for path in NOTEBOOKS:
        text = json.dumps(read(path).cells)
        assert set(re.findall(r"[\w-]+\.ipynb", text)) <= {p.name for p in NOTEBOOKS}
        assert text.count(f"/blob/main/notebooks/{path.name}") == 1
