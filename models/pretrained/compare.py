"""Whether two configs describe the same function of the parameters."""

import dataclasses
from typing import Any

from ...layers.mamba import inner_width
from ..config import BackboneConfig
from ..pattern import parse

# What says how training begins or goes on, how it is computed, or how arrays are kept.
OTHERWISE = frozenset(
    """
    init_std scale_residual ratio multiple_of capacity priority jitter temperature bias_rate
    balance pooled z dt_min dt_max dt_floor A_range vocab_multiple residual_float32 dtype
    param_dtype pipeline stacked unroll remat loss_chunk pattern
    """.split()  # noqa: SIM905
)


def difference(first: BackboneConfig, second: BackboneConfig) -> str | None:
    """The first option in which they differ, as `name=value, not value`; None if in none."""
    if type(first) is not type(second):
        return f"{type(first).__name__}, not {type(second).__name__}"
    ours, theirs = _function(first), _function(second)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            return f"{name}={ours.get(name)}, not {theirs.get(name)}"
    return None


def _function(config: BackboneConfig) -> dict[str, Any]:
    """Every option that counts, by name, with what None stands for."""
    kinds = parse(config.pattern, config.depth)
    groups = {kind.mixer for kind in kinds} | {"residual"}
    mlps = {kind.mlp for kind in kinds}
    found: dict[str, Any] = {"blocks": kinds}
    if mlps - {"moe", "none"}:
        groups |= {"mlp"}
    if "moe" in mlps:
        groups |= {"moe"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in OTHERWISE:
            continue
        if not dataclasses.is_dataclass(value):
            found[field.name] = value
        elif field.name in groups:
            found |= _flat(field.name, value)
    return found | _resolved(config, found)


def _flat(prefix: str, group: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value, name = getattr(group, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            found |= _flat(name, value)
        elif field.name not in OTHERWISE:
            found[name] = value
    return found


def _resolved(config: BackboneConfig, found: dict[str, Any]) -> dict[str, Any]:
    width, hidden, moe = config.width, config.mlp.width(config.width), config.moe
    values = {
        "mlp.hidden": hidden,
        "moe.hidden": moe.hidden or hidden,
        "moe.router.top": moe.router.choices,
        "mamba.dt_rank": config.mamba.dt_rank or -(-width // 16),
        "mamba.norm_eps": config.mamba.norm_eps if config.mamba.norm != "none" else None,
    }
    for name in ("mamba", "mamba2"):
        values[f"{name}.expand"] = inner_width(getattr(config, name), width)
    for name in ("attention", "gla", "retention", "lightning", "aaren"):
        group = getattr(config, name)
        heads = group.heads
        values[f"{name}.kv_heads"] = getattr(group, "kv_heads", None) or heads
        values[f"{name}.head_width"] = getattr(group, "head_width", None) or width // heads
    for name in ("gla", "retention"):
        for part in ("key_ratio", "value_ratio"):
            values[f"{name}.{part}"] = round(width * getattr(getattr(config, name), part)) / width
    return {name: value for name, value in values.items() if name in found}
