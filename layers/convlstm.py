"""ConvLSTM: an LSTM whose products are convolutions over frames  (arXiv:1506.04214)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels.convolution import convolve
from ..sharding import mesh, sequence
from .depth import ONLY, Depth
from .image import ImageConv
from .norm import LayerNorm

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ConvLSTMConfig:
    """ConvLSTM (arXiv:1506.04214), without peepholes."""

    image: tuple[int, int] = (16, 16)
    """Height and width that `init_state` makes room for; a call without a state takes any."""
    hidden: int | None = None
    """Channels of the state's two frames; the model's width if None."""
    kernel: int = 3
    """Height and width of the convolutions of inputs and of states."""
    norm_eps: float = 1e-6
    """Added to the variance in the LayerNorm."""


class ConvLSTM(nnx.Module):
    """y_t = LayerNorm(x_t + W h_t), h_t = sigmoid(o_t) tanh(c_t),
    c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(g_t), (i, f, o, g)_t = X * x_t + H * h_{t-1} + b.

    The paper's equations 3 without their peepholes (products of c with i, f and o), which few
    implementations have; residual and norm are those of ConvS5's layer. The bias of f starts at 1.
    h passes through sigmoids and tanh, so that no summary of a span of frames exists: the state's
    convolution runs a frame at a time, and time does not divide over the devices of `seq`. On a
    mesh rows are divided, and whatever else it has computes the same. Source: arXiv:1506.04214.
    """

    def __init__(
        self,
        width: int,
        config: ConvLSTMConfig = ConvLSTMConfig(),
        *,
        depth: Depth = ONLY,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del depth  # every block is alike
        self.config, self.dtype = config, dtype
        self.exact = exact = jnp.promote_types(jnp.float32, dtype)
        self.hidden, size = config.hidden or width, config.kernel
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        gates = 4 * self.hidden
        self.x = ImageConv(width, gates, size, **kinds)
        bias: Any = self.x.bias
        bias[...] = bias[...].at[self.hidden : 2 * self.hidden].set(1)
        self.h = ImageConv(self.hidden, gates, size, use_bias=False, **kinds)
        self.out = ImageConv(self.hidden, width, 1, **kinds)
        kinds["dtype"] = exact
        self.norm = LayerNorm(width, config.norm_eps, **kinds)

    def __call__(
        self,
        x: Float[Array, "B T H W D"],
        state: State | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H W D"], State]:
        """y, and the state after the last frame: `h` and `c` (B, H, W, hidden), float32 at least.

        Raises ValueError for a time of several frames that lies over devices.
        """
        if state is None:
            zeros = jnp.zeros((x.shape[0], *x.shape[2:4], self.hidden), self.exact)
            state = {"h": zeros, "c": zeros}
        graphdef, variables = nnx.split(self)

        def local(x, variables, state, reset):
            return nnx.merge(graphdef, variables).run(x, state, reset)

        if mesh.several():
            devices = mesh.size("seq")
            if devices > 1 and x.shape[1] > 1:
                raise ValueError(
                    f"seq={devices}: ConvLSTM is not linear in its state, so its time does not "
                    "divide over devices"
                )
            mesh.check(x.shape[0], x.shape[1])
            rows = P(mesh.ROWS)
            marks = None if reset is None else rows
            local = sequence.manual(local, (rows, P(), rows, marks), (rows, rows))
        return local(x, variables, state, reset)

    def run(self, x: Array, state: State, reset: Array | None) -> tuple[Array, State]:
        """All frames x (B, T, H, W, D) on this device; reset (B, T) or None."""
        kernel = self.h.kernel[...].astype(self.dtype)

        def step(carry, frame):
            (h, c), (gates, forget) = carry, frame
            if forget is not None:
                h, c = (jnp.where(forget[:, None, None, None], 0, s) for s in (h, c))
            more = convolve(h.astype(self.dtype), kernel)
            i, f, o, g = jnp.split((gates + more).astype(h.dtype), 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h.astype(self.dtype)

        frames = jnp.moveaxis(self.x(x), 1, 0), None if reset is None else reset.T
        (h, c), outputs = jax.lax.scan(step, (state["h"], state["c"]), frames)
        y = self.out(jnp.moveaxis(outputs, 0, 1))
        out = self.norm(x.astype(self.exact) + y.astype(self.exact))
        return out.astype(x.dtype), {"h": h, "c": c}

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike) -> State:
        """The state before any frame: `h` and `c` `(B, *image, hidden)`, of at least float32."""
        del max_length, dtype
        zeros = jnp.zeros((batch, *self.config.image, self.hidden), self.exact)
        return {"h": zeros, "c": zeros}
