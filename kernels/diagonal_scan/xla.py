"""The diagonal scan token by token, in place; the backward reads the outputs, computes none again.

With lam the gradient of the loss to x, from the last token to the first,

    lam_t = dx_t + conj(a_{t+1}) lam_{t+1}        du_t = lam_t
    d log a_t = conj(a_t x_{t-1}) lam_t           summed over the payload, and over what shares it

Least work for N complex numbers of x: 8 N operations forward, 16 N backward, half of those for
the decay's gradient. Least bytes in float32: 16 N forward (u read, x written), 24 N backward (dx
and x read, du written). Nothing is kept but x, which is the output, and the state.

B=2, T=64, 16 x 16 images, P=64 (N = 2.1 million; 34 and 50 MB at least, 2.4 and 3.6 ms at the
speed of a copy), milliseconds of one core, forward and forward with backward, and what memory the
latter takes besides its results:

    plain differentiation of `lax.scan`                9     44    51 MB
    plain differentiation of `lax.associative_scan`   52    207    93 MB
    this                                               5     13    0.5 MB

`lax.scan` wants time leading and so copies everything twice; here each token is cut out of (B, T,
...) and put into it. A state for one row, or for a part of the image, stays in a nearer cache, but
more and smaller steps take as long. A bfloat16 x is read back rounded, by the decay's gradient.
"""

import jax
import jax.numpy as jnp

from .. import keep
from .reference import exp, times

TURN = 4  # tokens a turn of the loop, between two of which XLA for CPUs copies the state


def diagonal_scan(u, log_decay, state, reset, chunk):
    """The recurrence, all payload axes as one; `chunk` has no meaning here and is not read."""
    del chunk
    shape, after = u[0].shape, state[0].shape
    u = jax.tree.map(lambda x: x.reshape(*shape[:2], -1, shape[-1]), u)
    state = jax.tree.map(lambda x: x.reshape(after[0], -1, after[-1]), state)
    x, state = _scan(u, log_decay, state, reset)
    return (
        jax.tree.map(lambda x: x.reshape(shape), x),
        jax.tree.map(lambda x: x.reshape(after), state),
    )


def _values(u, log, state, reset):
    """u (B, T, M, P), log (P,) or (B, T, P), state (B, M, P), reset (B, T) or None."""
    decay = _decays(log)

    def token(carry, i):
        before, x = carry
        after = _add(times(decay(i), _kept(reset, i, before)), _take(u, i, before[0].dtype))
        return (after, _put(x, i, after)), None

    steps = jnp.arange(u[0].shape[1], dtype=jnp.int32)
    x = jax.tree.map(jnp.zeros_like, u)
    (state, x), _ = jax.lax.scan(token, (state, x), steps, unroll=TURN)
    return x, state


def _forward(u, log, state, reset):
    x, after = _values(u, log, state, reset)
    return (x, after), (x, log, state, reset)


def _backward(residuals, cotangents):
    x, log, state, reset = residuals
    dx, dstate = cotangents
    decay, constant, exact = _decays(log), log[0].ndim == 1, state[0].dtype

    def token(carry, i):
        later, du, dlog = carry  # later: conj(a_{t+1}) lam_{t+1}
        lam = _add(_take(dx, i, exact), later)
        earlier = times(_conjugate(decay(i)), lam)
        before = _take(x, jnp.maximum(i - 1, 0), exact)
        before = jax.tree.map(lambda x, s: jnp.where(i > 0, x, s), before, state)
        part = times(_conjugate(_kept(reset, i, before)), earlier)
        if constant:  # a whole state is summed up: on a CPU faster than to sum over the payload
            dlog = _add(dlog, part)
        else:
            dlog = _put(dlog, i, jax.tree.map(lambda x: x.sum(1), part))
        return (_kept(reset, i, earlier), _put(du, i, lam), dlog), None

    steps = jnp.arange(dx[0].shape[1], dtype=jnp.int32)
    zeros = jax.tree.map(jnp.zeros_like, (dx, state if constant else log))
    (dstate, du, dlog), _ = jax.lax.scan(token, (dstate, *zeros), steps, reverse=True, unroll=TURN)
    if constant:
        dlog = jax.tree.map(lambda x: x.sum((0, 1)), dlog)
    return du, dlog, dstate, None


_scan = jax.custom_vjp(_values)
_scan.defvjp(keep.rule(_forward), _backward)


def _decays(log):
    """The function from a token's index to exp(log), a pair (P,) or (B, 1, P).

    All are made at once: inside the loop, XLA would make each again at every place of the payload.
    """
    decays = exp(log)
    if log[0].ndim == 1:
        return lambda i: decays
    return lambda i: jax.tree.map(lambda x: x[:, None], _take(decays, i, log[0].dtype))


def _kept(reset, i, x):
    """What crosses into token i: nothing, not even a nan, where a document begins."""
    if reset is None:
        return x
    first = jax.lax.dynamic_index_in_dim(reset, i, 1)[..., None]
    return jax.tree.map(lambda x: jnp.where(first, 0, x), x)


def _take(whole, i, dtype):
    def one(x):
        return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False).astype(dtype)

    return jax.tree.map(one, whole)


def _put(whole, i, part):
    def one(x, p):
        return jax.lax.dynamic_update_index_in_dim(x, p.astype(x.dtype), i, 1)

    return jax.tree.map(one, whole, part)


def _conjugate(x):
    return x[0], -x[1]


def _add(x, y):
    return x[0] + y[0], x[1] + y[1]
