"""A mesh of devices from a line of text, and what code that runs on one may ask of it.

Every mesh has all axes, those that are not named with one device, so that a PartitionSpec fits any:

    data      rows of a batch
    expert    rows, and the experts of a mixture
    fsdp      rows, and parameters between their uses
    seq       time
    tensor    heads, features and the vocabulary
    pipe      blocks; rows outside of them

The axes are Auto: XLA places what no constraint or shard_map does.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES: tuple[str, ...] = ("pipe", "data", "expert", "fsdp", "seq", "tensor")
ROWS = ("data", "expert", "fsdp")  # the axes that a batch's rows lie over inside a block
ENDS = (*ROWS, "pipe")  # and outside: the embedding and the loss are shared by all stages


def parse(text: str) -> dict[str, int]:
    """The sizes of all axes from `data=2,seq=4`. Raises ValueError naming what is wrong."""
    if not isinstance(text, str):
        raise ValueError(f"mesh {text!r} is no text of axes, as data=2,seq=4")
    sizes = dict.fromkeys(AXES, 1)
    given: set[str] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, sign, number = (word.strip() for word in part.partition("="))
        if axis not in AXES or not sign:
            known = ", ".join(AXES)
            raise ValueError(f"mesh {text!r}: {part!r} is not AXIS=N, with an AXIS of {known}")
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise ValueError(f"mesh {text!r}: {part!r} is not a number of devices, at least 1")
        if axis in given:
            raise ValueError(f"mesh {text!r}: {axis} is given twice; name each axis once")
        given.add(axis)
        sizes[axis] = int(number)
    return sizes


def make(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first of `devices` (None: all there are). ValueError for too few."""
    sizes = parse(text)
    given, devices = devices is not None, list(found() if devices is None else devices)
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        how = f"--emulate-devices {wanted}, in Python sharding.mesh.emulate({wanted})"
        advice = "" if given else f"; {how}, makes them of a CPU"
        raise ValueError(
            f"mesh {text!r} has {wanted} devices, and there are {len(devices)}{advice}"
        )
    without = set(range(jax.process_count())) - {d.process_index for d in devices[:wanted]}
    if without:
        raise ValueError(
            f"mesh {text!r} has {wanted} of {len(devices)} devices, and leaves process "
            f"{min(without)} without any"
        )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices[:wanted])


def found() -> list[Any]:
    """JAX's devices. ValueError if the platforms that are asked for are not there."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion without a word: no plugin
        asked = f"none of the platforms {jax.config.values['jax_platforms']} is there"
        reason = str(error).strip().partition("\n")[0] or asked
        raise ValueError(f"JAX has no devices: {reason}; JAX_PLATFORMS=cpu takes the CPU") from None


def emulate(devices: int) -> None:
    """Make so many devices of the CPU; 0 changes nothing. ValueError once JAX has found its own."""
    if not devices:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        if len(jax.devices()) < devices or jax.default_backend() != "cpu":
            raise ValueError(
                f"emulate_devices={devices}, but JAX already runs on {len(jax.devices())} devices "
                f"({jax.default_backend()}); make them before anything else asks JAX for its own"
            ) from None


def size(*axes: str) -> int:
    """Devices along these axes of the mesh in force (`jax.set_mesh`); 1 without one."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def several() -> bool:
    """Whether a mesh of `make` is in force, with several devices that no shard_map has taken."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names) and size(*free()) > 1


def free() -> list[str]:
    """The axes of the mesh in force that no shard_map around here has taken."""
    current = jax.sharding.get_abstract_mesh()
    return [axis for axis in current.axis_names if axis not in current.manual_axes]


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Lay x, of any shape, out so over the mesh in force; without one, x."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if several() else x


def sharding(mesh: Mesh, *spec: Any) -> NamedSharding:
    """Where an array lies whose axes go over these axes of a mesh; the others lie whole."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def spread(where: NamedSharding, count: int, make: Callable[..., Any]) -> dict[str, jax.Array]:
    """A batch of `count` rows over a mesh; make(rows=slice) is asked for this process's rows only.

    Its arrays are (rows, T, ...), of which `where` says how rows and T lie, or (rows,). The devices
    of one process may hold several spans of rows; each is made once, with all of its time, which
    is cut here. An array of rows alone lies as the rows do.
    """

    @functools.cache
    def made(first, last):
        return make(rows=slice(first, last))

    def part(name, index):
        first, last, _ = index[0].indices(count)
        return made(first, last)[name][:, *index[1:]]

    # rows alone lie as in an array of rows alone, whatever the other axes
    rows = NamedSharding(where.mesh, PartitionSpec(*where.spec[:1]))
    indices: Any = rows.addressable_devices_indices_map((count,))
    (index,) = next(iter(indices.values()))
    some = made(*index.indices(count)[:2])
    return {
        name: jax.make_array_from_callback(
            (count, *x.shape[1:]),
            where if x.ndim > 1 else rows,
            functools.partial(part, name),
            dtype=x.dtype,
        )
        for name, x in some.items()
    }


def divide(what: str, number: int, *axes: str) -> None:
    """Raise a ValueError, with the nearest that would do, if `number` does not divide over axes."""
    if number % size(*axes):
        raise ValueError(f"{what}={refusal(number, {axis: size(axis) for axis in axes})}")


def refusal(number: int, sizes: dict[str, int], what: str = "devices") -> str:
    """That a number does not divide over axes of these sizes, and the nearest that would."""
    parts = math.prod(sizes.values())
    over = " x ".join(f"{axis}={devices}" for axis, devices in sizes.items() if devices > 1)
    below = number // parts * parts
    near = f"{below} or {below + parts}" if below else f"{parts}"
    return f"{number} does not divide over {over} {what}; {near} would"


def check(
    rows: int, time: int, heads: int = 0, what: str = "heads", over: Sequence[str] = ROWS
) -> None:
    """Raise a ValueError that names the first size that does not divide over its axes."""
    divide("rows", rows, *over)
    over_time(time)
    divide(what, heads, "tensor")


def over_time(length: int) -> str | None:
    """The axis that so many tokens lie over: `seq`, or None for a single one, which all have.

    Raises ValueError for any other length that does not divide over it.
    """
    if length == 1 or not several():
        return None
    divide("length", length, "seq")
    return "seq"


def up(number: int, *axes: str) -> int:
    """The least number from this on that divides over axes of the mesh in force."""
    return -(-number // size(*axes)) * size(*axes)


def only(over: Mesh, *axes: str) -> Mesh:
    """The mesh. Raises ValueError if it has several devices along any other axis."""
    for axis, devices in over.shape.items():
        if devices > 1 and axis not in axes:
            raise ValueError(f"mesh {axis}={devices}: only {', '.join(axes)} are used here")
    return over
