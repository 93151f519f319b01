"""What the backward pass keeps of a chain that it computes again."""

import jax
import jax.numpy as jnp
from scanax.kernels import keep
from support.compare import close


def chain(x, y):
    return jax.nn.silu(jnp.tanh(x) * y) * jnp.exp(-y)


def test_only_the_arguments_are_kept():
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 5))

    def kept(f):
        pull = jax.vjp(f, x, y)[1]
        return sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size > 1)

    assert len(kept(chain)) > 2
    assert kept(keep.again(chain)) == [x.shape, y.shape]


def test_values_and_gradients_are_the_same():
    x, y = jax.random.normal(jax.random.key(1), (2, 3, 5))

    def total(f):
        return lambda x, y: jnp.sum(jnp.sin(f(x, y)))

    again = keep.again(chain)
    close(again(x, y), chain(x, y), 1e-6)
    for ours, theirs in zip(
        jax.grad(total(again), (0, 1))(x, y), jax.grad(total(chain), (0, 1))(x, y), strict=True
    ):
        close(ours, theirs, 1e-6)
    vectors = jnp.stack([x, y]), jnp.stack([y, x])
    close(jax.vmap(again)(*vectors), jax.vmap(chain)(*vectors), 1e-6)
    ours, theirs = (jax.jvp(f, (x, y), (y, x))[1] for f in (again, chain))
    close(ours, theirs, 1e-6)
