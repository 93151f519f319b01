"""What a layer of experts costs by degree and slices, in bytes and in modelled seconds.

A device's traffic, forward, in elements (Tutel, arXiv:2206.03382): 2 r S (W - 1) / W for tokens
there and back, with S the assignments of its tokens, and P (1 / r - 1 / G) for weights of P an
expert; P E (W - 1) / W where no token is sent. The backward pass exchanges as much, sums weights'
gradients in float32, and computes twice as much; with a ladder it sends and computes the tokens
once more, and gathered weights are gathered once more.
"""

from typing import NamedTuple

from .expert import Layout

SLICES = (1, 2, 4, 8)


class Machine(NamedTuple):
    """What a device does in a second, and what an exchange takes at least."""

    flops: float
    link: float
    """Bytes that a device receives in a second."""
    latency: float
    """Seconds."""


class Work(NamedTuple):
    """One layer, for one device."""

    assignments: int
    """Of its tokens to experts."""
    width: int
    hidden: int
    matrices: int
    """Kernels of an expert: three with a gate, else two."""
    itemsize: int
    """Bytes of a number, as it is computed with and sent."""
    room: float = 1.0
    """What is sent over what there is: the factor of the ladder that holds the load."""
    again: bool = False
    """Whether there is a ladder."""


class Cost(NamedTuple):
    degree: int
    slices: int
    sent: float
    """Bytes of tokens that a device receives forward, there and back."""
    gathered: float
    """Bytes of weights that it receives forward."""
    seconds: float
    """Modelled, forward and backward."""


def table(devices: int, experts: int, work: Work, machine: Machine) -> list[Cost]:
    """The cost of every degree and number of slices."""
    parts = max(devices // experts, 1)
    degrees = [0, *(r for r in range(1, parts + 1) if parts % r == 0)]
    return [
        cost(Layout(devices, experts, degree, slices), work, machine)
        for degree in degrees
        for slices in (SLICES if degree else (1,))
    ]


def best(costs: list[Cost]) -> Cost:
    """The quickest; of equals the first."""
    return min(costs, key=lambda cost: cost.seconds)


def cost(plan: Layout, work: Work, machine: Machine) -> Cost:
    """Of one layout."""
    one = work.matrices * work.hidden * work.width * work.itemsize  # an expert's weights
    rest = (plan.devices - 1) / plan.devices
    tokens = work.assignments * work.room * work.width * work.itemsize
    sent = 2 * plan.degree * tokens * rest
    gathered = one * plan.experts * rest
    if plan.degree:
        gathered = one * (1 / plan.degree - 1 / plan.parts)
    compute = 2 * work.assignments * work.matrices * work.hidden * work.width / machine.flops
    # there, once more for the backward pass, and gradients back
    weights = gathered * (2 + 4 / work.itemsize) / machine.link + 3 * machine.latency * bool(
        gathered
    )
    way = sent / 2 / machine.link / plan.slices + machine.latency * bool(sent)
    seconds = weights
    for times in (1, 2):
        seconds += pipelined(plan.slices, way, times * compute / plan.slices)
    if work.again and plan.degree:
        seconds += plan.slices * way + compute
    return Cost(plan.degree, plan.slices, sent, gathered, seconds)


def pipelined(slices: int, way: float, compute: float) -> float:
    """Seconds until all slices are there, computed and back: one link and one device, in order."""
    there = [way * (i + 1) for i in range(slices)]
    free, link = 0.0, there[-1]
    for arrived in there:
        free = max(free, arrived) + compute
        link = max(link, free) + way
    return link
