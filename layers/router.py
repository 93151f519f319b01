"""Routers: which experts a token goes to, and with which weights. All of it in float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..kernels import routing
from .router_config import RouterConfig


class Routed(NamedTuple):
    """What a router decides, and the numbers of its losses."""

    routing: routing.Routing
    logits: Float[Array, "B T E"]
    extra: dict[str, Array]


class Router(nnx.Module):
    """Softmax of a projection, the top k of it."""

    def __init__(self, width: int, experts: int, config: RouterConfig, *, dtype: Any, rngs):
        self.config, self.experts = config, experts
        self.kernel = nnx.Param(self._drawn((width, experts), dtype, rngs))

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        config, logits = self.config, self.logits(x)
        found = routing.softmax(logits, config.choices, renormalize=config.renormalize)
        return Routed(found, logits, {})

    def logits(self, x: Array) -> Float[Array, "B T E"]:
        return _product(x, self.kernel[...])

    def _drawn(self, shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs) -> Array:
        return nnx.initializers.normal(self.config.init_std)(rngs.params(), shape, dtype)


class GShard(Router):
    """Two experts, the second kept in training with probability min(1, 2 w2) (arXiv:2006.16668)."""

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        logits = self.logits(x)
        found = routing.gshard(logits, key)
        first = routing.load(found.experts, self.experts, first=True)
        return Routed(found, logits, {"moe_first": first})


class Switch(Router):
    """One expert, weighted by its probability  (arXiv:2101.03961)."""

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        if key is not None and self.config.jitter:
            x = routing.jitter(x.astype(self.kernel.dtype), key, self.config.jitter)
        logits = self.logits(x)
        return Routed(routing.switch(logits), logits, {})


class Noisy(Router):
    """Top k of L + N(0, 1) softplus(x W_noise), softmax over those kept  (arXiv:1701.06538)."""

    def __init__(self, width: int, experts: int, config: RouterConfig, *, dtype: Any, rngs):
        super().__init__(width, experts, config, dtype=dtype, rngs=rngs)
        self.noise = nnx.Param(jnp.zeros((width, experts), dtype))

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        logits, noise = self.logits(x), _product(x, self.noise[...])
        found, importance, load = routing.noisy(logits, noise, self.config.choices, key)
        return Routed(found, logits, {"moe_importance": importance, "moe_smooth_load": load})


class Cosine(Router):
    """Softmax of cosines over a learned temperature, the top k of it  (arXiv:2204.09179)."""

    def __init__(self, width: int, experts: int, config: RouterConfig, *, dtype: Any, rngs):
        self.config, self.experts = config, experts
        self.kernel = nnx.Param(self._drawn((width, config.cosine_width), dtype, rngs))
        self.vectors = nnx.Param(self._drawn((experts, config.cosine_width), dtype, rngs))
        self.log_temperature = nnx.Param(jnp.log(jnp.asarray(config.temperature, dtype)))

    def logits(self, x: Array) -> Float[Array, "B T E"]:
        h = _product(x, self.kernel[...])
        return routing.cosine_logits(h, self.vectors[...], self.log_temperature[...])


class Sigmoid(Router):
    """Top k of sigmoid(L) + bias, weights without the bias  (DeepSeek-V3, arXiv:2412.19437)."""

    def __init__(self, width: int, experts: int, config: RouterConfig, *, dtype: Any, rngs):
        super().__init__(width, experts, config, dtype=dtype, rngs=rngs)
        if experts % config.groups or config.kept_groups > config.groups:
            raise ValueError(
                f"groups={config.groups}, kept_groups={config.kept_groups}: {experts} experts do "
                "not divide into the groups, or there are fewer groups than are kept"
            )
        self.bias = nnx.Param(jnp.zeros((experts,), dtype))  # no gradient: `rebalanced` moves it

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        config, logits = self.config, self.logits(x)
        found = routing.sigmoid(
            logits,
            self.bias[...],
            config.choices,
            scale=config.scale,
            groups=config.groups,
            kept_groups=config.kept_groups,
        )
        return Routed(found, logits, {})


class ExpertChoice(Router):
    """Every expert takes the tokens of a row that want it most  (arXiv:2202.09368)."""

    def __call__(self, x: Float[Array, "B T D"], key: Array | None = None) -> Routed:
        logits = self.logits(x)
        count = max(1, x.shape[1] * self.config.choices // self.experts)
        return Routed(routing.expert_choice(logits, min(count, x.shape[1])), logits, {})


ROUTERS = {
    "softmax": Router,
    "gshard": GShard,
    "switch": Switch,
    "noisy": Noisy,
    "cosine": Cosine,
    "sigmoid": Sigmoid,
    "expert-choice": ExpertChoice,
}


def _product(x, kernel):
    exact = jnp.promote_types(kernel.dtype, x.dtype)
    return jnp.einsum("...d,de->...e", x.astype(exact), kernel.astype(exact), precision="highest")


def losses(config: RouterConfig, aux: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
    """What is added to a model's loss, and the figures to be logged, of all layers' statistics.

    aux: arrays with a leading axis of layers, as `MoE` returns them. Figures: moe_balance and moe_z
    (means over layers), moe_load (layers, experts; shares of the assignments), moe_max_load (the
    busiest expert of any layer over the mean), moe_dropped (share of the assignments), moe_entropy
    (nats).
    """
    if "moe_load" not in aux:
        return 0.0, {}
    load, probability = aux["moe_load"], aux["moe_probability"]
    share = aux.get("moe_first", load)
    if "moe_importance" in aux:
        each = jax.vmap(routing.cv2)
        balance = each(aux["moe_importance"]) + each(aux["moe_smooth_load"])
    elif config.pooled:
        share, probability = (jnp.mean(a, axis=0, keepdims=True) for a in (share, probability))
        balance = jax.vmap(routing.balance)(share, probability)
    else:
        balance = jax.vmap(routing.balance)(share, probability)
    coefficient = config.balance
    if coefficient is None:
        coefficient = 0.0 if config.kind == "sigmoid" else 0.01
    added = coefficient * balance.sum() + config.z * aux["moe_z"].sum()
    figures = {
        "moe_balance": balance.mean(),
        "moe_z": aux["moe_z"].mean(),
        "moe_load": load,
        "moe_max_load": load.max() * load.shape[-1],
        "moe_dropped": aux["moe_dropped"].mean(),
        "moe_entropy": aux["moe_entropy"].mean(),
    }
    return added, figures
