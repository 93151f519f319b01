"""What a training step would cost on a mesh, before there is one: memory, work and traffic.

python -m scanax.experiments.plan mamba-1.4b --mesh fsdp=8 --rows 8 --length 2048
python -m scanax.experiments.plan gla-340m --mesh seq=8 --rows 1 --length 16384

python -m scanax.experiments.plan mamba-1.4b --mesh fsdp=64,data=4 --topology v5e:16x16 --rows 256

The step is compiled for as many emulated devices and nothing is allocated. Memory is then what
XLA's CPU compiler plans; an accelerator's keeps activations in another layout and fuses more. With
--topology it is compiled by the TPU's own compiler for chips that need not be there.
"""

import os
import sys

from scanax.experiments import starting

starting.begin(__name__)

import dataclasses
import importlib.util
import math
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from scanax.experiments import flags
from scanax.experiments import step as steps
from scanax.kernels import dispatch
from scanax.sharding import hlo, mesh
from scanax.sharding.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Count what a training step costs on a mesh."""

    preset: Annotated[str, tyro.conf.Positional]
    """An experiment of experiments/configs or a model of published size."""
    mesh: str = ""
    """Devices by axis, as data=2,seq=4; one device if empty."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How what lies over the mesh is exchanged."""
    topology: str = ""
    """TPUs to compile for, as v5e:4x4 or v5p:2x2x1 (extra `tpu-aot`); emulated CPUs if empty."""
    dtype: str | None = None
    """Compute dtype, as bfloat16; the preset's if None."""
    rows: int | None = None
    """Sequences a step; the preset's if None."""
    length: int | None = None
    """Tokens of a sequence; the preset's if None."""
    remat: str | None = None
    """What blocks keep for the backward pass: none, full or dots; the preset's if None."""


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong."""
    about = "Count what a training step costs on a mesh, without allocating anything."
    try:
        config = flags.parse(
            PlanConfig, None, sys.argv[1:] if args is None else args, "plan", about
        )
        if not config.topology:
            mesh.emulate(math.prod(mesh.parse(config.mesh).values()))
        for line in lines(plan(config)):
            print(line)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


def plan(config: PlanConfig) -> dict[str, Any]:
    """Figures of one step, each a device's: bytes, floating-point operations, collectives."""
    task = flags.language_model(config.preset).task
    model = task.model
    for name in ("remat", "dtype"):
        if getattr(config, name) is not None:
            model = dataclasses.replace(model, **{name: getattr(config, name)})
    changed = {"rows": config.rows, "length": config.length}
    changed = {name: value for name, value in changed.items() if value is not None}
    task = dataclasses.replace(task, model=model, **changed)
    optimizer = flags.preset(config.preset).optimizer
    over = mesh.make(config.mesh, chips(config.topology))
    with jax.set_mesh(over):
        mesh.divide("length", task.length, "seq")
    program, state = steps.abstract(task, optimizer, 1, over, config.schedule)
    shape = (task.rows, task.length)
    kinds = {"tokens": np.int32, "targets": np.int32, "reset": bool, "weights": np.float32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=program.rows)
        for name, kind in kinds.items()
    }
    kind = over.devices.flat[0].device_kind
    here = dispatch.Target("tpu", kind) if config.topology else dispatch.target()
    with dispatch.on(here):
        traced = program.step.trace(state, program.rest, batch, *steps.SCALARS)
    platforms = ("tpu",) if config.topology else None
    try:
        compiled = traced.lower(lowering_platforms=platforms).compile()
    except jax.errors.JaxRuntimeError as error:  # it does not fit the chips' memory, say
        raise ValueError(f"the step cannot be compiled: {str(error).splitlines()[0]}") from None
    counted, memory = hlo.count(compiled.as_text()), compiled.memory_analysis()
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"])),
        "tokens": math.prod(shape),
        "devices": over.size,
        "parameter_bytes": held(state["params"]),
        "optimizer_bytes": held(state["optimizer"]),
        "temporary_bytes": memory.temp_size_in_bytes,
        # a TPU's matrix products are convolutions of many shapes, which are not counted
        "flops": None if config.topology else counted.flops,
        "unknown": counted.unknown,
        "calls": dict(counted.calls),
        "received_bytes": dict(counted.received),
    }


def chips(topology: str) -> list[Any] | None:
    """The devices of a TPU topology, or None for what JAX finds. ValueError if there is none."""
    if not topology:
        return None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={topology!r} needs the TPU's compiler: pip install 'scanax[tpu-aot]'"
        )
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"topology={topology!r} is not one of libtpu's: {said}") from None


def held(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as text."""

    def size(number):
        return f"{number / 1e6:,.1f} MB" if number < 1e9 else f"{number / 1e9:,.2f} GB"

    devices = found["devices"]
    text = [
        f"{found['parameters'] / 1e6:,.1f} million parameters, {found['tokens']:,} tokens a step, "
        f"{devices} device{'s' * (devices > 1)}; each of them:",
        f"  parameters          {size(found['parameter_bytes']):>12}",
        f"  optimizer state     {size(found['optimizer_bytes']):>12}",
        f"  activations, other  {size(found['temporary_bytes']):>12}",
    ]
    if found["flops"] is not None:
        text.append(f"  operations          {found['flops'] / 1e12:>9,.3f} T")
    if found["unknown"]:
        text.append(f"  ({found['unknown']} loops depend on the data: counted as if they ran once)")
    for kind, calls in sorted(found["calls"].items()):
        received = size(found["received_bytes"][kind])
        text.append(f"  {kind:<19} {received:>12} received in {calls} calls")
    return text


if __name__ == "__main__":
    sys.exit(main())
