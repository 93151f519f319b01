"""Mixture of experts: a channel mixer of which each token uses a few parts."""

import dataclasses
from functools import partial
from typing import Literal, get_args, get_origin

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels import checks, grouped_matmul, keep, routing
from ..sharding import expert
from .depth import ONLY, Depth
from .gate import swish_gated
from .linear import Linear
from .mlp import MLPConfig, SwiGLU
from .router import ROUTERS
from .router_config import RouterConfig


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts in place of an MLP.

    Source: arXiv:1701.06538. Raises ValueError for options that do not go together.
    """

    experts: int = 8
    """Number of experts."""
    hidden: int | None = None
    """Hidden width of each expert in features; None: that of the model's MLPs."""
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    """What an expert is: down(silu(gate(x)) * up(x)), or down(act(up(x)))."""
    shared: int = 0
    """Hidden width, in features, of an expert (swiglu) that all tokens use; 0: none."""
    shared_gate: bool = False
    """Whether that one's output is multiplied by sigmoid of a projection (Qwen2-MoE)."""
    capacity: float = 0.0
    """In training: how many tokens an expert takes at most, over its even share of a device's; the
    rest are dropped. 0: none is dropped. Evaluation and decoding drop none."""
    priority: Literal["order", "score"] = "order"
    """Who is dropped last: first choices and earlier tokens, or tokens with the largest weights."""
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    """The router."""

    def __post_init__(self):
        for each in dataclasses.fields(self):
            value, known = getattr(self, each.name), get_args(each.type)
            if get_origin(each.type) is Literal and value not in known:
                raise ValueError(f"{each.name}={value!r} is not one of {', '.join(known)}")
        if self.router.choices > self.experts:
            raise ValueError(
                f"router.top={self.router.choices} of experts={self.experts}; it can be at most all"
            )
        if self.capacity < 0:
            raise ValueError(f"capacity={self.capacity}; it must be 0 (dropless) or more")
        if self.capacity and self.router.kind == "expert-choice":
            raise ValueError(f"capacity={self.capacity}: expert-choice has its router.top instead")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate is for a shared expert, and shared=0")
        if self.priority != "order" and not self.capacity:
            raise ValueError(f"priority={self.priority} is for a capacity, and capacity=0 (none)")


class MoE(nnx.Module):
    """y_t = sum over a token's experts of w_te expert_e(x_t), + shared(x_t)  (arXiv:1701.06538).

    Kernels are (experts x hidden, width), the hidden features of one expert after those of another:
    however many devices share them, each has an equal part (`sharding.expert`). Raises ValueError
    for an x of another shape.
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig = MoEConfig(),
        mlp: MLPConfig | None = None,
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mlp = mlp or MLPConfig()
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.hidden, self.tanh = config.hidden or mlp.width(width), mlp.tanh
        shrink = depth.branches**-0.5 if mlp.scale_residual else 1.0
        shape = config.experts * self.hidden, width

        def drawn(fan_in, scale=1.0):
            if mlp.init_std is not None:
                return nnx.initializers.normal(mlp.init_std * scale)(
                    rngs.params(), shape, param_dtype
                )
            bound = scale * fan_in**-0.5
            return jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)

        self.gate = nnx.data(None)
        if config.activation == "swiglu":
            self.gate = nnx.Param(drawn(width))
        self.up = nnx.Param(drawn(width))
        self.down = nnx.Param(drawn(self.hidden, shrink))
        self.up_bias = self.down_bias = nnx.data(None)
        if mlp.bias:
            self.up_bias = nnx.Param(jnp.zeros(shape[0], param_dtype))
            self.down_bias = nnx.Param(jnp.zeros((config.experts, width), param_dtype))
        exact = jnp.promote_types(jnp.float32, param_dtype)
        self.router = ROUTERS[config.router.kind](
            width, config.experts, config.router, dtype=exact, rngs=rngs
        )
        self.shared = self.shared_gate = nnx.data(None)
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if config.shared:
            one = dataclasses.replace(mlp, hidden=config.shared)
            self.shared = SwiGLU(width, one, depth=depth, **options)
        if config.shared_gate:
            self.shared_gate = Linear(width, 1, use_bias=False, **options)

    def __call__(
        self, x: Float[Array, "B T D"], key: Array | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """y, and the statistics that `router.losses` takes. With a key, as in training: what is
        random is drawn, and a capacity drops tokens.
        """
        checks.stream(x, None)
        if x.shape[-1] != self.up.shape[1]:
            raise ValueError(f"x has {x.shape[-1]} features; the experts take {self.up.shape[1]}")
        config = self.config
        (experts, weights, probabilities), logits, aux = self.router(x, key)
        x = x.astype(self.dtype)
        kernels = {"gate": self.gate, "up": self.up, "down": self.down, "up_bias": self.up_bias}
        y, dropped = expert.run(
            self._computed,
            x,
            experts,
            weights,
            {name: kernel[...] for name, kernel in kernels.items() if kernel is not None},
            config.experts,
            bias=None if self.down_bias is None else self.down_bias[...],
            capacity=0.0 if key is None else config.capacity,
            scores=probabilities.max(axis=-1) if config.priority == "score" else None,
        )
        if self.shared is not None:
            always = self.shared(x)
            if self.shared_gate is not None:
                always = always * jax.nn.sigmoid(self.shared_gate(x))
            y = y + always
        aux = aux | {
            "moe_load": routing.load(experts, config.experts),
            "moe_probability": probabilities.mean(axis=(0, 1)),
            "moe_z": routing.z(logits),
            "moe_entropy": routing.entropy(probabilities),
            "moe_dropped": dropped,
        }
        return y, aux

    def _computed(self, x: Array, sizes: Array, kernels: dict[str, Array]) -> Array:
        """Each expert, or slice of one, on its rows."""
        up = grouped_matmul(x, kernels["up"], sizes, transpose=True)
        if "up_bias" in kernels:
            ones = jnp.ones((x.shape[0], 1), x.dtype)  # its gradient is summed as a kernel's
            up = up + grouped_matmul(ones, kernels["up_bias"][:, None], sizes)
        if "gate" in kernels:
            up = swish_gated(up, grouped_matmul(x, kernels["gate"], sizes, transpose=True))
        elif self.config.activation == "gelu":
            up = keep.again(partial(jax.nn.gelu, approximate=self.tanh))(up)
        else:
            up = jax.nn.relu(up)
        return grouped_matmul(up, kernels["down"], sizes)
