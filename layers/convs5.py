"""ConvS5: a linear state-space model whose state is an image, decaying alike at every pixel."""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..sharding.ops import diagonal_scan
from .depth import ONLY, Depth
from .diagonal import Pair, held, initial
from .image import ImageConv, Kernel, convolve
from .norm import GroupNorm, LayerNorm

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ConvS5Config:
    """ConvS5 (arXiv:2310.19694)."""

    image: tuple[int, int] = (16, 16)
    """Height and width that `init_state` makes room for; a call without a state takes any."""
    state: int | None = None
    """Numbers of state per pixel, half of them real and half imaginary parts; None is the width."""
    blocks: int = 1
    """Copies of the initial state matrix, each of state / blocks numbers."""
    kernel_in: int = 3
    """Height and width of the convolution into the state (B)."""
    kernel_out: int = 3
    """Height and width of the convolution out of the state (C)."""
    kernel_skip: int = 3
    """Height and width of the convolution past the state (D), or of those of the ResNet block."""
    block: Literal["standard", "resnet"] = "standard"
    """What follows the state: gelu(GroupNorm(y + conv(u))) or a ResNet block of y."""
    groups: int = 32
    """Groups of channels of the GroupNorms; they divide the width."""
    clip: bool = True
    """Real parts of eigenvalues above -1e-4 count as -1e-4."""
    dt_min: float = 1e-3
    """Smallest initial step size; they are drawn log-uniformly."""
    dt_max: float = 0.1
    """Largest initial step size."""
    norm_eps: float = 1e-6
    """Added to the variance in all norms."""


class ConvS5(nnx.Module):
    """LayerNorm(u + block(y)), y_t = 2 Re(C * x_t), x_t = exp(L dt) x_{t-1} + B' * u_t.

    Here * is a convolution, B' = (exp(L dt) - 1) / L B, L (P,) complex; P is half of `state`, whose
    conjugates are left out. arXiv:2310.19694. The output has the dtype of the input. Raises
    ValueError for a `state` that is not an even number for each of its blocks.
    """

    def __init__(
        self,
        width: int,
        config: ConvS5Config = ConvS5Config(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del depth  # every block is alike
        self.config, self.dtype = config, dtype
        self.exact = exact = jnp.promote_types(jnp.float32, dtype)
        sizes = width, config.state or width, config.blocks, config.kernel_in, config.kernel_out
        eigenvalues, B, C = initial(*sizes, param_dtype=param_dtype, rngs=rngs)
        self.Lambda_re, self.Lambda_im = (nnx.Param(part) for part in eigenvalues)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        channels = self.Lambda_re.shape
        self.log_step = nnx.Param(rngs.params.uniform(channels, param_dtype, low, high))
        self.B, self.C = Kernel(B), Kernel(C)  # (h, w, in, out, 2): real and imaginary parts last
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        conv = partial(ImageConv, width, width, config.kernel_skip, dtype=dtype, **kinds)
        group_norm = partial(GroupNorm, width, config.groups, config.norm_eps, dtype=dtype, **kinds)
        if config.block == "standard":
            self.D, self.group_norm = conv(), group_norm()
        else:
            self.norm_1, self.conv_1 = group_norm(), conv()
            self.norm_2, self.conv_2 = group_norm(), conv()
        self.norm = LayerNorm(width, config.norm_eps, dtype=exact, **kinds)

    def __call__(
        self,
        x: Float[Array, "B T H W D"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H W D"], State]:
        """y, and the state after the last frame: `re` and `im` (B, H, W, P), float32 at least."""
        log_decay, B = self.discretised()
        channels = log_decay[0].size
        u = convolve(x.astype(self.dtype), jnp.concatenate(B, axis=3).astype(self.dtype))
        before = None if state is None else (state["re"], state["im"])
        pair = u[..., :channels], u[..., channels:]
        X, (re, im) = diagonal_scan(pair, log_decay, state=before, reset=reset)
        C = 2 * self.C.kernel[...].astype(self.exact)
        C = jnp.concatenate([C[..., 0], -C[..., 1]], axis=2).astype(self.dtype)
        y = self.after(convolve(jnp.concatenate(X, axis=-1), C), x)
        out = self.norm(x.astype(self.exact) + y.astype(self.exact))
        return out.astype(x.dtype), {"re": re, "im": im}

    def discretised(self) -> tuple[Pair, Pair]:
        """(log decay (P,), B' (h, w, D, P)) by a zero-order hold."""
        re, im = (part[...].astype(self.exact) for part in (self.Lambda_re, self.Lambda_im))
        if self.config.clip:
            re = jnp.minimum(re, -1e-4)
        dt = jnp.exp(self.log_step[...].astype(self.exact))
        held_re, held_im = held(re, im, dt)
        B = self.B.kernel[...].astype(self.exact)
        B_re, B_im = B[..., 0], B[..., 1]
        B = held_re * B_re - held_im * B_im, held_re * B_im + held_im * B_re
        return (re * dt, im * dt), B

    def after(self, y: Array, u: Array) -> Array:
        """What follows the state, before the residual sum: y and u (B, T, H, W, D)."""
        if self.config.block == "standard":
            return jax.nn.gelu(self.group_norm(y + self.D(u)))
        inner = self.conv_1(jax.nn.gelu(self.norm_1(y)))
        return jax.nn.gelu(self.conv_2(jax.nn.gelu(self.norm_2(inner))) + y)

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> State:
        """The state before any frame: `re` and `im` `(B, *image, P)`, of at least float32."""
        del max_length, dtype
        zeros = jnp.zeros((batch, *self.config.image, *self.Lambda_re.shape), self.exact)
        return {"re": zeros, "im": zeros}
