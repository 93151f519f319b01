"""Diagonal state-space models: how they begin (HiPPO-LegS), and the step of a zero-order hold."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Pair = tuple[Array, Array]  # real and imaginary parts


@functools.lru_cache
def legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(w (size / 2,), V (size, size / 2)): eigenvalues -1/2 + i w of HiPPO-LegS, and their vectors.

    A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, 0 above; with p_n = sqrt(n + 1/2),
    A + p p^T = -1/2 + (an antisymmetric matrix), whose eigenvalues are i w in conjugate pairs: of
    each pair the half with w < 0 is kept, in ascending order  (arXiv:2008.07669, arXiv:2208.04933).
    """
    root = np.sqrt(2 * np.arange(size) + 1.0)
    below = np.tril(np.outer(root, root) / 2, -1)
    frequencies, vectors = np.linalg.eigh(-1j * (below.T - below))
    return frequencies[: size // 2], vectors[:, : size // 2]


def held(re: Float[Array, "P"], im: Float[Array, "P"], dt: Float[Array, "P"]) -> Pair:
    """(exp(L dt) - 1) / L for L = re + i im, accurate for small L dt, where the two would cancel.

    expm1(a + ib) = expm1(a) cos b - 2 sin(b / 2)^2 + i exp(a) sin b.
    """
    a, b = re * dt, im * dt
    above_re = jnp.expm1(a) * jnp.cos(b) - 2 * jnp.sin(b / 2) ** 2
    above_im = jnp.exp(a) * jnp.sin(b)
    square = re * re + im * im
    return (above_re * re + above_im * im) / square, (above_im * re - above_re * im) / square


def initial(
    width: int,
    size: int,
    blocks: int,
    kernel_in: int,
    kernel_out: int,
    *,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> tuple[Pair, Array, Array]:
    """(L (P,), B (h, w, D, P, 2), C (h, w, P, D, 2)), P = size / 2, the last axis (re, im).

    L is HiPPO-LegS's of `blocks` matrices side by side, B and C are He-normal, of `size` numbers of
    state each, in the basis of its eigenvectors: V^H B, C V.
    """
    if blocks < 1 or size % (2 * blocks):
        raise ValueError(f"state={size} is not an even number for each of blocks={blocks}")
    k, c, each = kernel_in, kernel_out, size // blocks
    frequencies, V = legs(each)
    im = jnp.tile(jnp.asarray(frequencies, param_dtype), blocks)
    draw = nnx.initializers.he_normal()
    exact = jnp.promote_types(jnp.float32, param_dtype)
    B = draw(rngs.params(), (k * k * width, size), exact)
    C = draw(rngs.params(), (c * c * size, width), exact)

    def turned(equation, x, vectors, shape):
        parts = (jnp.asarray(part, exact) for part in (vectors.real, vectors.imag))
        found = [jnp.einsum(equation, x, part, precision="highest") for part in parts]
        return jnp.stack([part.reshape(shape) for part in found], axis=-1).astype(param_dtype)

    B = B.reshape(k, k, width, blocks, each)
    B = turned("hwdkn,np->hwdkp", B, V.conj(), (k, k, width, size // 2))
    C = C.reshape(c, c, blocks, each, width)
    C = turned("hwknd,np->hwkpd", C, V, (c, c, size // 2, width))
    return (jnp.full_like(im, -0.5), im), B, C
