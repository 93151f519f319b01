"""Where a model's parameters and states lie on a mesh: Megatron-LM's cut, and fsdp.

A projection into heads or hidden features is cut by columns over `tensor`, the one back by rows, so
that a block exchanges activations once after its mixer and once after its MLP (arXiv:1909.08053).
What is left of a matrix is cut over `fsdp`.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from ..sharding import expert, rules
from ..sharding.mesh import ROWS
from .block import runs
from .config import BackboneConfig
from .pattern import Kind, imported

INTO, BACK, WITHIN = P("fsdp", "tensor"), P("tensor", "fsdp"), P("tensor")
EVERYWHERE, FEATURES = P(), P(None, "tensor")
CONV = P(None, None, None, "fsdp")  # height, width, channels in, channels out
BOTH = ("tensor", "fsdp")  # of one axis, where the other is too small to be cut
RULES = (
    # of video: convolutions, whole on every device while they are used
    (r"(convs5|convlstm)\.\w+\.kernel|encoder\.[\w.]+\.kernel", CONV),
    (r"decoder\.(stem|blocks\.\d+\.\w+)\.kernel", CONV),
    (r"(convs5|convlstm)\.(\w+\.bias|\w+\.scale|Lambda_(re|im)|log_step)", EVERYWHERE),
    (r"encoder\.[\w.]+|decoder\.[\w.]+", EVERYWHERE),  # the last convolution makes few channels
    (r"position", EVERYWHERE),
    # mixers and MLPs: matrices (in, out), then their biases and what else each head or channel has
    (r"\w+\.(q|k|v|x|z|dt|gate|up)\.kernel", INTO),
    (r"\w+\.(q|k|v|x|z|dt|gate|up)\.bias", WITHIN),
    (r"\w+\.(out|down)\.kernel", BACK),
    (r"\w+\.(out|down)\.bias", EVERYWHERE),
    (r"gla\.decay_down\.kernel", P("fsdp")),
    (r"gla\.decay_up\.kernel", P(None, BOTH)),
    (r"gla\.decay_up\.bias", WITHIN),
    (r"mamba\.((dt_down|B|C)\.kernel|A_log)", P(BOTH)),
    (r"mamba\.dt_up\.kernel", P(None, BOTH)),
    (r"mamba\.(B|C)_constant", EVERYWHERE),
    (r"mamba2\.(B|C)\.kernel", P("fsdp")),
    (r"mamba2\.(B|C)\.bias", EVERYWHERE),
    (r"mamba2?\.(A_log|D|dt_bias|scale)", WITHIN),
    (r"mamba2\.(B|C)_conv\.(kernel|bias)", EVERYWHERE),
    (r"\w+\.(conv|x_conv)(\.[qkv])?\.kernel", FEATURES),
    (r"\w+\.(conv|x_conv)(\.[qkv])?\.bias", WITHIN),
    (r"moe\.shared\.(gate|up)\.kernel", INTO),
    (r"moe\.shared\.(gate|up)\.bias", WITHIN),
    (r"moe\.shared\.down\.kernel", BACK),
    (r"moe\.shared\.down\.bias|moe\.shared_gate\.kernel", EVERYWHERE),
    (r"moe\.(gate|up|down)", expert.KERNEL),
    (r"moe\.up_bias", expert.BIAS),
    (r"moe\.(down_bias|router\.\w+)", EVERYWHERE),
    (r"lightning\.theta", WITHIN),
    (r"aaren\.token", EVERYWHERE),
    (r"(\w+\.)?(\w+_)?norm\.(scale|bias)", EVERYWHERE),
    (r"(mixer|mlp)_scale", EVERYWHERE),
    (r"embedding", BACK),
    (r"head\.kernel", INTO),
    # what a network over numbers reads and says: a few numbers, which tensor does not cut
    (r"input\.kernel|position", P(None, "fsdp")),
    (r"output\.kernel", P("fsdp")),
    (r"(input|output)\.bias|class_token", EVERYWHERE),
)
STATES = (  # of every mixer, by what it calls its parts
    (r"k|v", P(ROWS, "tensor", "seq")),
    (r"S|m|u|w", P(ROWS, "tensor")),
    (r"conv(_[qkv])?|[xBC]_conv", P(ROWS, None, "tensor")),
    (r"re|im", P(ROWS, None, None, "tensor")),
    (r"length|start|position|h|c", P(ROWS)),
    (r".*", P(ROWS)),  # what a mixer of one's own calls its parts: whole, beside the rows
)


def specs(config: BackboneConfig, params: dict[str, Any]) -> dict[str, Any]:
    """A tree of PartitionSpecs like the parameters; a stack of blocks leads with its layers."""

    def one(path, _):
        names = [str(part.key) for part in path]
        if names[0] != "blocks":
            return rules.match(RULES, ".".join(names))
        kind = runs(config)[int(names[1])].kind
        roles = {"mixer": kind.role, "mlp": kind.mlp}
        name = ".".join(roles.get(part, part) for part in names[2:])
        return P("pipe", *rules.match((*own(kind), *RULES), name))

    return jax.tree_util.tree_map_with_path(one, params)


def own(kind: Kind) -> rules.Rules:
    """The rules of a mixer `module:Class`: its attribute `places`, names to PartitionSpecs."""
    if not kind.own:
        return ()
    places = getattr(imported(kind.mixer), "places", {})
    return [(rf"{kind.role}\.({name})", spec) for name, spec in places.items()]


def shardings(config: BackboneConfig, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """`specs` on a mesh. Raises ValueError for a size that does not divide over its axis."""
    stages = mesh.shape["pipe"]
    if config.pipeline[0] != stages:
        raise ValueError(f"blocks stacked for pipe={config.pipeline[0]} on a mesh of pipe={stages}")
    if "moe" in {run.kind.mlp for run in runs(config)}:
        with use_abstract_mesh(mesh.abstract_mesh):  # it says which number of experts would do
            expert.layout(config.moe.experts, config.moe.hidden or config.mlp.width(config.width))
    tree = specs(config, params)

    def one(path, leaf, spec):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rules.check(name, leaf.shape, spec, dict(mesh.shape))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, params, tree)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where a model's state lies on a mesh: its rows, its heads or channels, slots of a cache.

    A few heads or channels that do not divide over `tensor` lie whole on every device.
    """
    devices = mesh.shape["tensor"]

    def one(path, leaf):
        spec = rules.match(STATES, jax.tree_util.keystr(path[-1:], simple=True))
        kept = (
            None if axis == "tensor" and size % devices else axis
            for axis, size in zip(spec, leaf.shape, strict=False)
        )
        return NamedSharding(mesh, P(*kept))

    return jax.tree_util.tree_map_with_path(one, state)
