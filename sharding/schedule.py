"""How work that lies over a mesh is exchanged: which schedule in place of another, same results.

`with using(Schedule(attention="ring")):` puts one in force for what is traced inside; functions
that were compiled under another are compiled again.
"""

import dataclasses
import math
from contextlib import AbstractContextManager
from typing import Literal, get_args, get_origin

import jax


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How what lies over a mesh is exchanged; the results are the same.

    Raises ValueError for a value that is not one of a field's, or that another leaves no use for.
    """

    states: Literal["gather", "scan", "ring"] = "gather"
    """Summaries of mixers with a state, over the axis seq: one all-gather (LASP-2), log2 P
    exchanges one after the other (for large states or many devices), or a ring of P - 1."""
    attention: Literal["gather", "ring", "token-ring", "ulysses"] = "gather"
    """Softmax attention over the axis seq: keys and values gathered (LASP-2H; a window gathers from
    the devices that it reaches), sent round a ring, queries sent round it and their partial results
    back (TokenRing), or heads exchanged for time by all-to-all (Ulysses)."""
    matmul: Literal["plain", "ring"] = "plain"
    """Products over the axis tensor: what they exchange before or after them, or in blocks that go
    round while they compute (collective matmul), the residual stream over tensor too."""
    microbatches: int = 0
    """Equal parts of a batch's rows that follow each other through the stages of the axis pipe, a
    multiple of its devices; 0: as many. A stage is idle for (pipe - 1) / (rounds x microbatches) of
    the time that it works."""
    rounds: int = 1
    """How often a microbatch goes round the axis pipe, through as many parts of each stage
    (Megatron-LM's interleaved schedule): less idle time, more exchanges."""

    expert_degree: int = 1
    """To how many slices of its expert a token is sent, where an expert lies over several devices
    (axes expert and tensor); 0: to none, all weights are gathered (Tutel's r)."""
    expert_slices: int = 1
    """In how many parts tokens are sent to experts, one while another is computed."""
    expert_node: int = 1
    """Neighbours along the axes expert and tensor that make a node: tokens are exchanged within
    nodes first, then between them; 1: at once."""
    expert_ladder: tuple[float, ...] = (1.25, 2.0)
    """Room for tokens that one device sends another, over the even share, of which the least that
    holds a step's load is taken; more than the last holds goes in rounds. Empty: room for all."""

    def __post_init__(self):
        for each in dataclasses.fields(self):
            value, known = getattr(self, each.name), get_args(each.type)
            if get_origin(each.type) is Literal and value not in known:
                raise ValueError(f"{each.name}={value!r} is not one of {', '.join(known)}")
        leasts = {"microbatches": 0, "rounds": 1}
        leasts |= {"expert_degree": 0, "expert_slices": 1, "expert_node": 1}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {least}")
        if not all(0 < factor < math.inf for factor in self.expert_ladder):
            raise ValueError(f"expert_ladder={self.expert_ladder}; all must be finite, more than 0")
        for name in ("expert_slices", "expert_node", "expert_ladder"):
            value = getattr(self, name)
            default = {field.name: field.default for field in dataclasses.fields(self)}[name]
            if self.expert_degree == 0 and value != default:
                raise ValueError(f"{name}={value} is for tokens that travel; expert_degree=0")

    def check(self, sizes: dict[str, int]) -> None:
        """Raise a ValueError for a choice that these sizes of a mesh's axes leave no use for."""
        uses = {"states": "seq", "attention": "seq", "matmul": "tensor"}
        uses |= {"microbatches": "pipe", "rounds": "pipe"}
        uses |= {
            field.name: "expert" for field in dataclasses.fields(self) if "expert" in field.name
        }
        for name, axis in uses.items():
            value = getattr(self, name)
            alone = sizes[axis] == 1 and (axis != "expert" or sizes["tensor"] == 1)
            if value != getattr(PLAIN, name) and alone:
                raise ValueError(f"schedule.{name}={value} is for a mesh with {axis}=2 or more")


PLAIN = Schedule()
_context = jax.make_user_context(PLAIN)


def using(schedule: Schedule) -> AbstractContextManager[None]:
    """A context manager under which `schedule` is in force."""
    return _context(schedule)


def in_force() -> Schedule:
    """The schedule that `using` has put in force, or the plain one."""
    return _context.value
