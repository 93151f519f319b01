import jax
import jax.numpy as jnp


def grouped_matmul(x, w, sizes, *, transpose=False, implementation=None):
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    i = jnp.arange(x.shape[0], dtype=jnp.int32)
    g = (i[:, None] >= ends).sum(1)
    m = (g[:, None] == jnp.arange(w.shape[0])).astype(x.dtype)
    return jnp.einsum(
        "mk,me,enk->mn" if transpose else "mk,me,ekn->mn",
        x,
        m,
        w.astype(x.dtype),
        precision="highest",
    )
