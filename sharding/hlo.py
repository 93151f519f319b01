"""What a compiled program does: floating-point operations, and what each device sends and receives.

It walks the text of the optimised HLO and multiplies a loop's body by its trip count, which XLA's
own `cost_analysis` does not.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

ITEM = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ARITHMETIC = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "power"),
    *("exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "erf"),
    *("sqrt", "rsqrt", "cbrt", "sine", "cosine", "remainder"),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    """What stands between the parentheses: the value of a constant."""


@dataclasses.dataclass
class Counts:
    """Of one device's program: every device runs the same one."""

    flops: float = 0.0
    """A multiply-add of a matrix product counts two, any other arithmetic one an element."""
    calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    """How often each kind of collective runs."""
    unknown: int = 0
    """Loops whose trip count depends on the data: their body is counted once."""
    received: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    """Bytes that the busiest device receives by each kind, if it goes round a ring."""


def count(text: str) -> Counts:
    """The counts of `compiled.as_text()`."""
    computations, entry = parse(text)
    total = Counts()
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions[1]) if partitions else 1
    by_device: dict[int, float] = collections.defaultdict(float)
    chains: set[str] = set()
    for times, one, types in walk(computations, entry, 1):
        total.flops += times * flops(one, types)
        total.unknown += one.opcode == "while" and trips(computations, one) is None
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or group(one, everyone) == 1:
            continue
        chain = re.search(r'chain_id="(\d+)"', one.attributes)  # on a TPU, pieces of one exchange
        if chain and chain[1] in chains:
            continue
        chains |= {chain[1]} if chain else set()
        total.calls[kind] += times
        if kind == "collective-permute":  # each device may be a target or not
            pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.attributes)
            for target in re.findall(r"\{\d+,(\d+)\}", pairs[1] if pairs else ""):
                by_device[int(target)] += times * operand_bytes(one, types)
        else:
            total.received[kind] += times * wire(kind, one, types, everyone)
    if by_device:
        total.received["collective-permute"] = max(by_device.values())
    return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a module by name, and the name of the one it begins with."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if head:
            body = computations[head[2]] = []
            entry = head[2] if head[1] else entry
            continue
        item = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
        if item:
            kind, rest = type_and_rest(item[2])
            opcode, _, rest = rest.partition("(")
            inside, attributes = balanced(rest)
            names = tuple(re.findall(r"%([\w.\-]+)", inside))
            body.append(Instruction(item[1], kind, opcode.strip(), names, attributes, inside))
    return computations, entry


def type_and_rest(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside, rest = balanced(text[1:])
    return f"({inside})", rest


def balanced(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes an open one, and after it."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def walk(
    computations: dict[str, list[Instruction]], name: str, times: int
) -> Iterator[tuple[int, Instruction, dict[str, str]]]:
    """Every instruction that runs, how often, and the types of its computation's instructions."""
    types = {one.name: one.type for one in computations[name]}
    for one in computations[name]:
        yield times, one, types
        again = times
        if one.opcode == "while":
            again = times * (trips(computations, one) or 1)
        if one.opcode in ("while", "fusion", "call", "async-start"):
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", one.attributes):
                yield from walk(computations, called, again)
        elif one.opcode == "conditional":  # the branch that does most
            named = re.findall(r"branch_computations=\{(.*?)\}", one.attributes)
            branches = re.findall(r"%?([\w.\-]+)", named[0]) if named else []
            branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.attributes)
            work = [list(walk(computations, branch, again)) for branch in branches]
            yield from max(work, key=lambda w: sum(t * flops(i, ty) for t, i, ty in w))


def trips(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """How often a loop runs: as XLA noted it, or while a counter from 0 is below a constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    body = computations.get(condition[1], []) if condition else []
    constants = {one.name: one.literal for one in body if one.opcode == "constant"}
    bounds = [
        constants[one.operands[1]]
        for one in body
        if one.opcode == "compare"
        and "direction=LT" in one.attributes
        and one.operands[1] in constants
    ]
    return int(bounds[0]) if len(bounds) == 1 else None


def arrays(kind: str) -> list[tuple[str, int]]:
    """(dtype, number of elements) of the arrays of a type."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", kind)
    return [(dtype, math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in found]


def size_of(kind: str) -> float:
    """Bytes of the arrays of a type."""
    bits = {dtype: int(re.sub(r"\D.*", "", dtype[1:]) or 8) for dtype, _ in arrays(kind)}
    return float(sum(number * ITEM.get(dtype, bits[dtype] / 8) for dtype, number in arrays(kind)))


def flops(one: Instruction, types: dict[str, str]) -> float:
    """Floating-point operations of one instruction, what it calls aside."""
    dtype, number = (arrays(one.type) or [("", 0)])[0]
    if one.opcode == "dot":
        shape = re.search(r"\[([\d,]*)\]", types[one.operands[0]])
        dims = [int(n) for n in shape[1].split(",") if n] if shape else []
        over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        summed = [dims[int(i)] for i in over[1].split(",") if i] if over else []
        return 2.0 * number * math.prod(summed)
    if not dtype.startswith(("f", "bf", "c")):
        return 0.0
    if one.opcode in ARITHMETIC:
        return float(number)
    if one.opcode == "reduce":
        return float(sum(n for _, n in arrays(types[one.operands[0]])))
    if one.opcode == "reduce-window":
        window = re.search(r"size=([\dx]+)", one.attributes)
        return float(number * math.prod(map(int, window[1].split("x")))) if window else 0.0
    return 0.0


def operand_bytes(one: Instruction, types: dict[str, str]) -> float:
    return float(sum(size_of(types[name]) for name in one.operands))


def wire(kind: str, one: Instruction, types: dict[str, str], everyone: int) -> float:
    """Bytes that a device receives in a collective over a group of devices."""
    devices = group(one, everyone)
    part = (devices - 1) / devices
    factor = {"all-gather": devices - 1, "all-reduce": 2 * part}
    return operand_bytes(one, types) * factor.get(kind, part)


def group(one: Instruction, everyone: int) -> int:
    """How many devices a collective is among; all of them where it does not say."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", one.attributes)
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", one.attributes)
    if named:  # by axes, as jax 0.12 has it
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", one.attributes)
    return len(listed[1].split(",")) if listed else int(iota[1]) if iota else everyone
