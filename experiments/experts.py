"""Which degree and how many slices suit the experts of a model on a mesh: a table, and the choice.

python -m scanax.experiments.experts moe --mesh expert=8 --emulate-devices 8 --measure
python -m scanax.experiments.experts moe --mesh expert=16 --tflops 197 --link-gbs 200
"""

import sys

from scanax.experiments import starting

starting.begin(__name__)

import dataclasses
import math
import statistics
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.sharding import Mesh
from scanax.experiments import bounds, flags
from scanax.layers.moe import MoE
from scanax.models import LMConfig, merge, split
from scanax.models.pattern import parse
from scanax.sharding import expert, expert_cost, mesh, schedule
from scanax.sharding.expert_cost import Cost, Machine, Work
from scanax.sharding.schedule import PLAIN

# what a chip receives from its neighbours, as their makers publish it, and how long that takes
LINKS = {
    "TPU v4": (300e9, 1e-6),
    "TPU v5 lite": (200e9, 1e-6),
    "TPU v5": (600e9, 1e-6),
    "TPU v6 lite": (448e9, 1e-6),
    "NVIDIA H100 80GB HBM3": (450e9, 5e-6),
    "NVIDIA H200": (450e9, 5e-6),
}
MACHINES = {kind: Machine(bounds.DEVICES[kind].flops, *link) for kind, link in LINKS.items()}


@dataclasses.dataclass(frozen=True)
class Experts:
    """Compare degrees and slices of a model's experts on a mesh."""

    preset: Annotated[str, tyro.conf.Positional]
    """An experiment of experiments/configs, with experts."""
    mesh: str = ""
    """Devices by axis, as expert=8: data, expert, fsdp, seq, tensor."""
    rows: int | None = None
    """Sequences that are computed at once; None: those of the preset's step."""
    length: int | None = None
    """Tokens of a sequence; None: the preset's."""
    measure: bool = False
    """Time each setting on these devices, forward and backward, and choose by that."""
    repeats: int | None = None
    """With --measure, timed runs of each, of which the median counts; None: 5."""
    tflops: float | None = None
    """10^12 operations a device does in a second; None: as published for this kind of device."""
    link_gbs: float | None = None
    """10^9 bytes a device receives in a second; None: as published."""
    latency_us: float | None = None
    """Microseconds that an exchange takes at least; None: as for this kind of device, else 5."""
    emulate_devices: int = 0
    """Make this many devices of the CPU, to try a mesh on; 0: use the devices there are."""


def main(args: list[str] | None = None) -> int:
    """0: done. 2: something given is wrong."""
    about = "Compare degrees and slices of a model's experts on a mesh, and say which to take."
    try:
        args = sys.argv[1:] if args is None else args
        config = flags.parse(Experts, None, args, "experts", about)
        check(config)
        mesh.emulate(config.emulate_devices)
        report(config)
    except (ValueError, OSError) as error:
        print(f"experts: {error}", file=sys.stderr)
        return 2
    return 0


def check(config: Experts) -> None:
    """Raise a ValueError for a number that cannot be, or would not be used."""
    for name in ("tflops", "link_gbs", "repeats"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}; it must be more than 0")
    for name in ("latency_us", "emulate_devices"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}; it must be 0 or more")
    if config.repeats is not None and not config.measure:
        raise ValueError(f"repeats={config.repeats} is for --measure")


def report(config: Experts) -> None:
    """Print the table and what to choose. ValueError for a model or machine that cannot be."""
    task = flags.language_model(config.preset).task
    changed = {"rows": config.rows, "length": config.length}
    task = dataclasses.replace(task, **{k: v for k, v in changed.items() if v is not None})
    model: LMConfig = task.model
    if "moe" not in {kind.mlp for kind in parse(model.pattern, model.depth)}:
        raise ValueError(f"pattern {model.pattern!r} has no experts")
    over = mesh.only(mesh.make(config.mesh), *mesh.ROWS, "seq", "tensor")
    with jax.set_mesh(over):
        mesh.check(task.rows, task.length)
        devices = mesh.size(*expert.GROUP)
        if devices == 1:
            raise ValueError(f"mesh {config.mesh!r} has one device for all experts; try expert=8")
        hidden = model.moe.hidden or model.mlp.width(model.width)
        expert.layout(model.moe.experts, hidden)
        tokens = -(-task.rows * task.length // mesh.size(*mesh.ROWS, "seq", "tensor"))
        work = Work(
            tokens * model.moe.router.choices,
            model.width,
            hidden,
            3 if model.moe.activation == "swiglu" else 2,
            jnp.dtype(model.dtype).itemsize,
            room=PLAIN.expert_ladder[0],
            again=True,
        )
        machine = machine_of(config)
        if machine is None and not config.measure:
            kind = jax.devices()[0].device_kind
            raise ValueError(
                f"what a {kind!r} does is not known: give --tflops and --link-gbs, or --measure"
            )
        costs = expert_cost.table(
            devices, model.moe.experts, work, machine or Machine(math.inf, math.inf, 0.0)
        )
        print(f"{devices} devices, {model.moe.experts} experts, {work.assignments:,} assignments")
        print("degree slices   tokens MB  weights MB" + "  modelled ms" * bool(machine), end="")
        print("  measured ms" * config.measure)
        timed = []
        for one in costs:
            line = (
                f"{one.degree:6} {one.slices:6} {one.sent / 1e6:11.3f} {one.gathered / 1e6:11.3f}"
            )
            line += f" {one.seconds * 1e3:12.4g}" if machine else ""
            if config.measure:
                timed.append(one._replace(seconds=measured(task, over, one, config.repeats or 5)))
                line += f" {timed[-1].seconds * 1e3:12.4g}"
            print(line, flush=True)
    chosen = expert_cost.best(timed or costs)
    flag = f"--schedule.expert-degree {chosen.degree} --schedule.expert-slices {chosen.slices}"
    print(f"\n{'measured' if timed else 'modelled'} best: {flag}")


def machine_of(config: Experts) -> Machine | None:
    """What the flags say of the devices, beside what is published of their kind."""
    known = bounds.of_kind(MACHINES, jax.devices()[0].device_kind)
    if (config.tflops, config.link_gbs, config.latency_us) == (None, None, None):
        return known
    base = known or Machine(math.nan, math.nan, 5e-6)
    found = Machine(
        base.flops if config.tflops is None else config.tflops * 1e12,
        base.link if config.link_gbs is None else config.link_gbs * 1e9,
        base.latency if config.latency_us is None else config.latency_us * 1e-6,
    )
    if math.isnan(found.flops) or math.isnan(found.link):
        raise ValueError("give both --tflops and --link-gbs: neither is known of these devices")
    return found


def measured(task: Any, over: Mesh, one: Cost, repeats: int) -> float:
    """Median seconds of one layer of experts, forward and backward, on the mesh in force."""
    model = task.model
    how = dataclasses.replace(PLAIN, expert_degree=one.degree, expert_slices=one.slices)
    layer = MoE(model.width, model.moe, model.mlp, dtype=jnp.dtype(model.dtype), rngs=nnx.Rngs(0))
    graphdef, params, rest = split(layer)
    shape = task.rows, task.length, model.width
    x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(model.dtype))

    def loss(params, x):
        y, _ = merge(graphdef, params, rest)(x)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    x = jax.device_put(x, mesh.sharding(over, mesh.ROWS, "seq"))
    lying = dict.fromkeys(("gate", "up", "down"), expert.KERNEL) | {"up_bias": expert.BIAS}

    def place(path, leaf):
        return jax.device_put(leaf, mesh.sharding(over, *lying.get(path[0].key, ())))

    params = jax.tree_util.tree_map_with_path(place, params)
    with schedule.using(how):
        run = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(run(params, x))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
