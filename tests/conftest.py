"""How every test runs: on the CPU, with signatures checked, and with compilations kept."""

import gc
import os
import tempfile
from pathlib import Path

# Before jax is imported, and through the environment, so that a test's subprocesses have it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "PJRT_NPROC", "1"
)  # threads of one process: the processes are what is parallel
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scanax" / "jax"),
)
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # for the tests of meshes
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
os.environ["SCANAX_TILES"] = os.devnull + "/none"  # no sizes that were tuned on this machine

import jax
import jaxtyping
import pytest

# The shapes and dtypes of every signature are checked, wherever a test comes by.
jaxtyping.install_import_hook("scanax", "beartype.beartype")


# Tracing makes objects by the million, of which few are garbage: looking for it after every 700
# takes a seventh of the time.
gc.set_threshold(50_000, 10, 5)

MAPPINGS = 25_000  # of the 65,530 that Linux gives a process


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Compiled programs take mappings of memory; where none are left, XLA ends the process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """Signatures are not checked, so that our own error is the one that is raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
