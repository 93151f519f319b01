"""Mamba's mixer: a selective scan behind a short convolution  (arXiv:2312.00752)."""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks, keep
from ..sharding.ops import selective_scan
from .conv import ShortConv
from .depth import ONLY, Depth
from .gate import swish_gated
from .linear import Linear, columns, rows
from .norm import RMSNorm, rms_norm

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Mamba (arXiv:2312.00752)."""

    expand: int | float = 2
    """Inner width as a multiple of the model's width, which need not be whole."""
    state: int = 16
    """Numbers of state per inner channel (N)."""
    conv: int = 4
    """Length of the causal convolution in tokens."""
    dt_rank: int | None = None
    """Rank of the projection that makes the step size; width / 16 rounded up if None."""
    dt_min: float = 1e-3
    """Smallest initial step size; they are drawn log-uniformly."""
    dt_max: float = 0.1
    """Largest initial step size."""
    dt_floor: float = 1e-4
    """Initial step sizes below this are raised to it."""
    bias: bool = False
    """Biases in the projections of x, z and the output."""
    conv_bias: bool = True
    """A bias in the convolution."""
    norm: Literal["none", "plain", "weighted"] = "none"
    """RMS norms of the low-rank dt, of B and of C: none (Mamba), without weight (plain, as in
    FalconMamba), or with (weighted, as in Jamba)."""
    norm_eps: float = 1e-6
    """Added to the mean square in those norms."""
    selective: bool = True
    """Whether dt, B and C are functions of the input; without, they are learned constants and the
    scan is a convolution: the time-invariant ablation of the paper."""


class Mamba(nnx.Module):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, out = W (silu(z) (h C + D u)), u = silu(conv(x)).

    dt = softplus(W_up W_down u + bias) for each channel; A is negative and real. Initialised as the
    released code: A_n = -n, D = 1, the output projection divided by sqrt(residual branches). Not
    selective: dt = softplus(bias), B and C are vectors (N,), at first 1 and normal as in S4D
    (arXiv:2206.11893).

    Source: arXiv:2312.00752. Raises ValueError for an inner width that is not whole, and for
    options of a projection that is not there.
    """

    def __init__(
        self,
        width: int,
        config: MambaConfig = MambaConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not config.selective and (config.norm != "none" or config.dt_rank is not None):
            raise ValueError(
                f"norm={config.norm!r}, dt_rank={config.dt_rank} with selective=False, where no "
                "projection makes dt, B and C; leave them out"
            )
        self.config, self.dtype = config, dtype
        inner, size = inner_width(config, width), config.state
        rank = config.dt_rank or math.ceil(width / 16)
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(din, dout, bias=False, gain=1.0):
            init = nnx.initializers.variance_scaling(gain**2 / 3, "fan_in", "uniform")
            return Linear(din, dout, use_bias=bias, kernel_init=init, **kinds)

        self.x, self.z = (linear(width, inner, config.bias), linear(width, inner, config.bias))
        self.conv = ShortConv(inner, config.conv, config.conv_bias, silu=True, **kinds)
        if config.selective:
            self.dt_down = linear(inner, rank)
            self.B, self.C = linear(inner, size), linear(inner, size)
            self.dt_up = linear(rank, inner)
        else:
            self.B_constant = nnx.Param(jnp.ones(size, param_dtype))
            self.C_constant = nnx.Param(rngs.params.normal((size,), param_dtype))
        self.dt_bias = nnx.Param(dt_bias(config, inner, param_dtype, rngs))
        rates = jnp.log(jnp.arange(1, size + 1, dtype=param_dtype))
        self.A_log = nnx.Param(jnp.broadcast_to(rates, (inner, size)) + 0)
        self.D = nnx.Param(jnp.ones(inner, param_dtype))
        self.out = linear(inner, width, config.bias, depth.branches**-0.5)
        if config.norm == "weighted":
            norm = partial(RMSNorm, eps=config.norm_eps, **kinds)
            self.dt_norm, self.B_norm, self.C_norm = norm(rank), norm(size), norm(size)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T W"], State]:
        """y, and the state after the last token: `S` (B, D, N), float32 at least, and `conv` (B,
        taps - 1, D). Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        window, h = (None, None) if state is None else (state["conv"], state["S"])
        _, u, z = columns(x, self.x, self.z)
        u, window = self.conv(u, window, reset)
        dt, B, C = self._selected(u) if self.config.selective else self._constants(u)
        exact = jnp.promote_types(jnp.float32, self.dtype)

        @keep.again
        def step_size(dt, bias):
            return softplus(dt.astype(exact) + bias.astype(exact))

        delta = step_size(dt, self.dt_bias[...])
        A = -jnp.exp(self.A_log[...].astype(exact))
        y, h = selective_scan(u, delta, A, B, C, D=self.D[...], state=h, reset=reset)
        return rows(self.out, swish_gated(y, z)), {"conv": window, "S": h}

    def _selected(self, u):
        dt, B, C = self.dt_down(u), self.B(u), self.C(u)
        if self.config.norm == "weighted":
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        elif self.config.norm == "plain":
            dt, B, C = (rms_norm(v, self.config.norm_eps).astype(v.dtype) for v in (dt, B, C))
        return self.dt_up(dt), B, C

    def _constants(self, u):
        B, C = (
            jnp.broadcast_to(v[...].astype(u.dtype), (*u.shape[:2], *v.shape))
            for v in (self.B_constant, self.C_constant)
        )
        return jnp.zeros_like(u), B, C

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> State:
        """The state before any token; its size does not depend on `max_length`."""
        del max_length
        exact = jnp.promote_types(jnp.float32, self.dtype)
        h = jnp.zeros((batch, *self.A_log.shape), exact)
        return {"conv": self.conv.init_window(batch, dtype), "S": h}


@jax.custom_jvp
def softplus(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log(1 + exp(x)), whose derivative is the sigmoid of x: JAX's own is of the result, which the
    backward pass would compute again, logarithm and all."""
    return jax.nn.softplus(x)


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * dx


def inner_width(config, width: int) -> int:
    """expand x width, in features. ValueError if it is not a whole number from 1 up."""
    inner = round(config.expand * width)
    if inner < 1 or abs(inner - config.expand * width) > 1e-6 * inner:
        raise ValueError(f"expand={config.expand} x {width=} is not a whole number of features")
    return inner


def dt_bias(config, size: int, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Float[Array, "size"]:
    """The inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max]."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = jnp.exp(rngs.params.uniform((size,), param_dtype, low, high))
    dt = jnp.maximum(dt, config.dt_floor)
    return dt + jnp.log(-jnp.expm1(-dt))
