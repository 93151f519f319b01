"""One block of a network, and runs of identical blocks stacked along a leading layer axis."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..layers.aaren import Aaren
from ..layers.attention import Attention
from ..layers.convlstm import ConvLSTM
from ..layers.convs5 import ConvS5
from ..layers.depth import Depth
from ..layers.gated_conv import GatedConv
from ..layers.gla import GLA
from ..layers.lightning import Lightning
from ..layers.mamba import Mamba
from ..layers.mamba2 import Mamba2
from ..layers.mlp import GELU, GLU, GeGLU, SwiGLU
from ..layers.moe import MoE
from ..layers.norm import LayerNorm, RMSNorm, SimpleRMSNorm
from ..layers.retention import Retention
from ..layers.vir import Vir
from ..sharding.mesh import refusal
from .config import BackboneConfig
from .pattern import Kind, imported, parse

MIXERS = {
    "gla": GLA,
    "retention": Retention,
    "vir": Vir,
    "lightning": Lightning,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "aaren": Aaren,
    "attention": Attention,
    "conv": GatedConv,
}
FRAMES = {"convs5": ConvS5, "convlstm": ConvLSTM}
MLPS = {"swiglu": SwiGLU, "geglu": GeGLU, "gelu": GELU, "glu": GLU}


def stream_dtype(config: BackboneConfig) -> jnp.dtype:
    """The dtype of the residual stream."""
    dtype = jnp.dtype(config.dtype)
    return jnp.promote_types(jnp.float32, dtype) if config.residual_float32 else dtype


def norm(config: BackboneConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """A norm over the residual stream, of the kind that the config names, returned in `dtype`."""
    param_dtype = jnp.dtype(config.param_dtype)
    if config.norm == "simple":
        return SimpleRMSNorm(config.norm_eps, dtype=dtype)
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.width, config.norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class Block(nnx.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)). Without an MLP the second half is left out.

    `config.residual` weighs these sums, has them start from norm(x), and learns a weight for each
    feature of what is added. Branches are never dropped at random (DropPath).
    """

    def __init__(self, config: BackboneConfig, kind: Kind, *, layer: int, rngs: nnx.Rngs):
        kinds = parse(config.pattern, config.depth)
        self.dtype = jnp.dtype(config.dtype)
        options = {
            "depth": Depth(layer, config.depth, len(kinds) + sum(k.mlp != "none" for k in kinds)),
            "dtype": self.dtype,
            "param_dtype": jnp.dtype(config.param_dtype),
            "rngs": rngs,
        }
        self.normed = config.residual.normed
        softmax = kind.mixer == "attention"
        self.mixer_factors = config.residual.attention if softmax else config.residual.linear
        self.mlp_factors = config.residual.mlp
        kept = stream_dtype(config) if self.normed else self.dtype
        self.mixer_norm = norm(config, kept, rngs)
        mixer = MIXERS.get(kind.mixer) or imported(kind.mixer)
        own = (getattr(config, kind.mixer),) if kind.mixer in MIXERS else ()
        self.mixer = mixer(config.width, *own, **options)
        self.mlp, self.mixer_scale, self.mlp_scale = (nnx.data(None) for _ in range(3))
        if kind.mlp != "none":
            self.mlp_norm = norm(config, kept, rngs)
        if (initial := config.residual.scale) is not None:
            each = functools.partial(jnp.full, config.width, initial, options["param_dtype"])
            self.mixer_scale = nnx.Param(each())
            self.mlp_scale = nnx.Param(each()) if kind.mlp != "none" else None
        if kind.mlp == "moe":
            self.mlp = MoE(config.width, config.moe, config.mlp, **options)
        elif kind.mlp != "none":
            self.mlp = MLPS[kind.mlp](config.width, config.mlp, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Any = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Array]]:
        """The stream after this block in its own dtype, the mixer's state, and auxiliary values."""
        h = self.mixer_norm(x)
        y, state = self.mixer(h.astype(self.dtype), state, reset)
        x, aux = self._sum(x, h, y, self.mixer_factors, self.mixer_scale), {}
        if self.mlp is None:
            return x, state, aux
        h = self.mlp_norm(x)
        if isinstance(self.mlp, MoE):
            y, aux = self.mlp(h.astype(self.dtype), key)
        else:
            y = self.mlp(h.astype(self.dtype))
        return self._sum(x, h, y, self.mlp_factors, self.mlp_scale), state, aux

    def _sum(
        self, x: Array, h: Array, y: Array, factors: tuple[float, float], scale: nnx.Param | None
    ) -> Array:
        """alpha x + beta y in the dtype of x; h = norm(x) stands for x in a normed stream."""
        terms = (h if self.normed else x).astype(x.dtype), y.astype(x.dtype)
        if scale is not None:
            terms = terms[0], terms[1] * scale[...].astype(x.dtype)
        kept, added = (
            term if factor == 1 else factor * term
            for factor, term in zip(factors, terms, strict=True)
        )
        return kept + added


class FrameBlock(nnx.Module):
    """x = mixer(x) for a mixer of frames, which has its residual, norm and nonlinearity inside."""

    def __init__(self, config: BackboneConfig, kind: Kind, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        kinds = {"dtype": self.dtype, "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs}
        own = dataclasses.replace(getattr(config, kind.mixer), image=config.frame)
        self.mixer = FRAMES[kind.mixer](config.width, own, **kinds)

    def __call__(
        self,
        x: Float[Array, "B T H W D"],
        state: Any = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T H W D"], Any, dict[str, Array]]:
        del key
        y, state = self.mixer(x.astype(self.dtype), state, reset)
        return y.astype(x.dtype), state, {}


class Run(NamedTuple):
    """Consecutive blocks that differ in nothing but the values of their variables.

    In a pipeline, such blocks at the same place of every part, by stage and then by round.
    """

    kind: Kind
    layers: tuple[int, ...]
    """Their numbers, in the order in which they are stacked."""


@functools.lru_cache(maxsize=1024)
def abstract(config: BackboneConfig, kind: Kind, layer: int) -> tuple[nnx.GraphDef, Any]:
    """One block without arrays: its structure, and the shapes and dtypes of its variables."""
    return nnx.split(nnx.eval_shape(functools.partial(_build, config, kind, layer)))


@functools.lru_cache(maxsize=64)
def runs(config: BackboneConfig) -> tuple[Run, ...]:
    """The blocks of a model, grouped into the longest runs of identical ones.

    Raises ValueError for a pipeline whose parts are not alike.
    """
    stages, rounds = config.pipeline
    if config.depth % (stages * rounds):
        over = {"pipe": stages, "rounds": rounds}
        raise ValueError(f"depth={refusal(config.depth, over, 'parts')}")
    kinds, size = parse(config.pattern, config.depth), config.depth // (stages * rounds)

    def blueprint(layer):
        graphdef, state = abstract(config, kinds[layer], layer)
        return kinds[layer], graphdef, jax.tree.structure(state), jax.tree.leaves(state)

    spans: list[range] = []  # of the first part
    for layer in range(size):
        if spans and config.stacked and blueprint(layer) == blueprint(layer - 1):
            spans[-1] = range(spans[-1].start, layer + 1)
        else:
            spans.append(range(layer, layer + 1))
    for layer in range(size, config.depth):
        if blueprint(layer) != blueprint(layer % size):
            ours, theirs = _name(kinds[layer]), _name(kinds[layer % size])
            if ours == theirs:
                both = (abstract(config, kinds[i], i)[1] for i in (layer, layer % size))
                ours += f" with {_difference(*both)}"
            raise ValueError(
                f"pipe={stages} with rounds={rounds} makes parts of {size} blocks, which must be "
                f"alike: block {layer} ({ours}) is not like block {layer % size} ({theirs})"
            )
    parts = [turn * stages + stage for stage in range(stages) for turn in range(rounds)]
    return tuple(
        Run(kinds[span.start], tuple(part * size + layer for part in parts for layer in span))
        for span in spans
    )


def _difference(*states: Any) -> str:
    """The first variable that one of two blocks lacks or has of another shape."""
    shapes = []
    for state in states:
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
        shapes.append(
            {jax.tree_util.keystr(p, simple=True, separator="."): x.shape for p, x in leaves}
        )
    names = sorted(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
    if not names:
        return "another option"
    return f"{names[0]} {shapes[0].get(names[0], 'missing')}"


def _name(kind: Kind) -> str:
    return kind.mixer if kind.mlp == "none" else f"{kind.mixer}+{kind.mlp}"


def _build(config: BackboneConfig, kind: Kind, layer: int, key: Array | int = 0) -> Any:
    if kind.mixer in FRAMES:
        return FrameBlock(config, kind, rngs=nnx.Rngs(key))
    return Block(config, kind, layer=layer, rngs=nnx.Rngs(key))


@functools.lru_cache(maxsize=256)
def _drawer(config: BackboneConfig, run: Run):
    """The compiled function from a key to the variables of a run, with a leading layer axis."""
    layers = run.layers

    def parameters(key):
        return nnx.split(_build(config, run.kind, layers[0], key), nnx.Param, ...)[1]

    def others(layer):
        return nnx.split(_build(config, run.kind, layer), nnx.Param, ...)[2]

    def draw(key):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.array(layers, jnp.uint32))
        each = [others(layers[0])]
        if jax.tree.leaves(each):  # the parameters that these blocks also have are dead code
            each += [others(layer) for layer in layers[1:]]
        # map, not vmap: random bits are what takes long to compile here, and vmap doubles it
        return jax.lax.map(parameters, keys), jax.tree.map(lambda *x: jnp.stack(x), *each)

    return jax.jit(draw)


def stack(config: BackboneConfig, run: Run, key: Array) -> Any:
    """The blocks of a run as one Block whose variables have a leading layer axis.

    Parameters are drawn for all layers at once: their distributions may depend on the number of
    layers, not on the layer. All else, such as decays by depth, is built layer by layer.
    """
    return nnx.merge(abstract(config, run.kind, run.layers[0])[0], *_drawer(config, run)(key))
