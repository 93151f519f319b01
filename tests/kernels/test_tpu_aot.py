"""The TPU's own compiler takes every kernel: it knows how much VMEM there is. `make test-tpu-aot`.

It comes with libtpu (extra `tpu-aot`) and needs no TPU.
"""

import importlib.util
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scanax.kernels.dispatch import Target, on
from support.lowered import CASES, WIDTHS, case

TOPOLOGIES = {
    "TPU v4": "v4:2x2x1",
    "TPU v5 lite": "v5e:2x2",
    "TPU v5p": "v5p:2x2x1",
    "TPU v6 lite": "v6e:2x2",
}
PAIRS = [(name, *pair) for name in CASES for pair in itertools.product(WIDTHS, WIDTHS)]
PAIRS = [(name, K, V) for name, K, V in PAIRS if K == V or name != "selective_scan"]
pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU's compiler, is not installed: pip install 'scanax[tpu-aot]'",
    ),
]


@pytest.fixture(autouse=True)
def nothing_cached():
    """A TPU's program cannot be read back without a TPU."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("name", "K", "V"), PAIRS)
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_compiles(kind, name, K, V, dtype):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind])
    here = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    for packed in (False, True) if K == V else (False,):
        run, arrays = case(name, "pallas_tpu", K, V, dtype, packed)
        arrays = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arrays
        )
        with on(Target("tpu", kind)):
            lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in lowered.compile().as_text()
