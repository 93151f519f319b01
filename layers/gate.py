"""Products with a gate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..kernels import keep


@keep.again
def swish_gated(x: Float[Array, "*S D"], gate: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    """x * silu(gate), in the wider of their dtypes."""
    return x * jax.nn.silu(gate.astype(jnp.promote_types(x.dtype, gate.dtype)))
