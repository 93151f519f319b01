"""Devices that are not here: what calls are traced for, and how their kernels run on this CPU."""

import contextlib

from scanax.kernels.dispatch import Target, on

TPU = Target("tpu", "TPU v5 lite")
HOPPER = Target("gpu", "NVIDIA H200", "9.0")
INTERPRETED = Target("tpu", "TPU v5 lite", interpret=True)


def tracing(implementation):
    """Where a named implementation is traced: a kernel for TPUs through the interpreter."""
    return on(INTERPRETED) if implementation == "pallas_tpu" else contextlib.nullcontext()
