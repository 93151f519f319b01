"""Devices that are not here: what calls are traced for, and how their kernels run on this CPU."""

import contextlib

from scanax.kernels.dispatch import Target, on

TPU = Target("tpu", "TPU v5 lite")
HOPPER = Target("gpu", "NVIDIA H200", "9.0")
TPU_KERNELS = ("pallas_tpu", "megablox")
INTERPRETED = Target("tpu", "TPU v5 lite", interpret=True)


def interpreted_hopper(**how):
    """A Hopper GPU through the interpreter, which may look for races."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams as Parameters
    except ImportError:  # before JAX 0.11
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as Parameters
    return Target("gpu", "NVIDIA H200", "9.0", interpret=Parameters(**how))


def tracing(implementation):
    """Where a named implementation is traced: a kernel for TPUs through the interpreter."""
    return on(INTERPRETED) if implementation in TPU_KERNELS else contextlib.nullcontext()
