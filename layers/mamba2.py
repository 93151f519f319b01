"""Mamba-2's mixer: linear attention with one decay a head and token  (arXiv:2405.21060)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels import checks, keep
from ..sharding.ops import linear_attention
from .conv import ShortConv
from .depth import ONLY, Depth
from .linear import Linear, columns, rows
from .mamba import dt_bias, inner_width
from .norm import rms_norm

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (arXiv:2405.21060)."""

    expand: int | float = 2
    """Inner width as a multiple of the model's width, which need not be whole."""
    head_width: int = 64
    """Features of one head; the number of heads is the inner width over it."""
    groups: int = 1
    """Groups of heads that share B and C, and groups of the norm before the output."""
    state: int = 128
    """Numbers of state per inner channel (N)."""
    conv: int = 4
    """Length of the causal convolutions in tokens."""
    dt_min: float = 1e-3
    """Smallest initial step size; they are drawn log-uniformly."""
    dt_max: float = 0.1
    """Largest initial step size."""
    dt_floor: float = 1e-4
    """Initial step sizes below this are raised to it."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Step sizes are clamped to this range in every forward pass."""
    A_range: tuple[float, float] = (1.0, 16.0)
    """Initial decay rates (-A) are drawn uniformly from this range."""
    bias: bool = False
    """Biases in the projections."""
    conv_bias: bool = True
    """Biases in the convolutions."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norm before the output."""


class Mamba2(nnx.Module):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, out = W norm(silu(z) (S^T C + D x)).

    dt = softplus(W_dt input + bias) for each head; x, B and C pass a convolution and silu. The norm
    is an RMS norm over each group. Initialised as the released code, the output projection divided
    by sqrt(residual branches).

    Source: arXiv:2405.21060. Raises ValueError for an inner width that does not split into heads
    and groups.
    """

    def __init__(
        self,
        width: int,
        config: Mamba2Config = Mamba2Config(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner, size = inner_width(config, width), config.groups * config.state
        heads, rest = divmod(inner, config.head_width)
        if rest or heads % config.groups:
            raise ValueError(
                f"inner width {inner} = {config.expand} x {width} must split into heads of "
                f"head_width={config.head_width}, and those into groups={config.groups}"
            )
        self.config, self.dtype, self.heads = config, dtype, heads
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(din, dout, gain=1.0):
            init = nnx.initializers.variance_scaling(gain**2 / 3, "fan_in", "uniform")
            return Linear(din, dout, use_bias=config.bias, kernel_init=init, **kinds)

        def conv(channels):
            return ShortConv(channels, config.conv, config.conv_bias, silu=True, **kinds)

        self.x, self.z, self.dt = (linear(width, inner), linear(width, inner), linear(width, heads))
        self.B, self.C = linear(width, size), linear(width, size)
        self.x_conv, self.B_conv, self.C_conv = conv(inner), conv(size), conv(size)
        self.dt_bias = nnx.Param(dt_bias(config, heads, param_dtype, rngs))
        self.A_log = nnx.Param(jnp.log(rngs.params.uniform((heads,), param_dtype, *config.A_range)))
        self.D = nnx.Param(jnp.ones(heads, param_dtype))
        self.scale = nnx.Param(jnp.ones(inner, param_dtype))
        self.out = linear(inner, width, depth.branches**-0.5)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T W"], State]:
        """y, and the state after the last token: `S` (B, H, N, V), float32 at least, and the three
        convolutions' windows. Raises ValueError for an x or a reset of another shape.
        """
        checks.stream(x, reset)
        config, carried = self.config, state or {}
        exact = jnp.promote_types(jnp.float32, self.dtype)

        x, u, z, dt = columns(x, self.x, self.z, self.dt)

        def mixed(y, conv, name, heads):
            y, window = conv(y, carried.get(name), reset)
            return rearrange(y, "b t (h k) -> b t h k", h=heads), window

        u, x_window = mixed(u, self.x_conv, "x_conv", self.heads)
        B, B_window = mixed(self.B(x), self.B_conv, "B_conv", config.groups)
        C, C_window = mixed(self.C(x), self.C_conv, "C_conv", config.groups)

        @keep.again
        def normed(y, u, z, D, scale):
            y = y.astype(exact) + D.astype(exact)[:, None] * u.astype(exact)
            y = rearrange(y, "b t h v -> b t (h v)") * jax.nn.silu(z.astype(exact))
            y = rms_norm(rearrange(y, "b t (g d) -> b t g d", g=config.groups), config.norm_eps)
            y = rearrange(y, "b t g d -> b t (g d)") * scale.astype(exact)
            return y.astype(self.dtype)

        dt = jax.nn.softplus(dt.astype(exact) + self.dt_bias[...].astype(exact))
        dt = jnp.clip(dt, *config.dt_limit)
        log_decay = -dt * jnp.exp(self.A_log[...].astype(exact))
        v = keep.again(lambda dt, u: (dt[..., None] * u.astype(exact)).astype(u.dtype))(dt, u)
        y, S = linear_attention(C, B, v, log_decay, state=carried.get("S"), reset=reset)
        y = normed(y, u, z, self.D[...], self.scale[...])
        state = {"x_conv": x_window, "B_conv": B_window, "C_conv": C_window, "S": S}
        return rows(self.out, y), state

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> State:
        """The state before any token; its size does not depend on `max_length`."""
        del max_length
        exact = jnp.promote_types(jnp.float32, self.dtype)
        convs = {"x_conv": self.x_conv, "B_conv": self.B_conv, "C_conv": self.C_conv}
        windows = {name: conv.init_window(batch, dtype) for name, conv in convs.items()}
        shape = (batch, self.heads, self.config.state, self.config.head_width)
        return {**windows, "S": jnp.zeros(shape, exact)}
