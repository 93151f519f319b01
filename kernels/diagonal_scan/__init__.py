"""A complex diagonal recurrence over images: x_t = exp(log_decay_t) x_{t-1} + u_t (S5, ConvS5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import checks
from ..dispatch import Implementation, call
from . import reference, xla

IMPLEMENTATIONS = {
    "xla": Implementation(xla.diagonal_scan),
    "reference": Implementation(reference.diagonal_scan),
    "associative": Implementation(reference.diagonal_scan_associative),
}
Tokens = tuple[Float[Array, "B T *S P"], Float[Array, "B T *S P"]]
Constant = tuple[Float[Array, "P"], Float[Array, "P"]]
PerToken = tuple[Float[Array, "B T P"], Float[Array, "B T P"]]
State = tuple[Float[Array, "B *S P"], Float[Array, "B *S P"]]


def diagonal_scan(
    u: Tokens,
    log_decay: Constant | PerToken,
    *,
    state: State | None = None,
    reset: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Tokens, State]:
    """x_t = exp(log_decay_t) x_{t-1} + u_t, complex numbers as pairs (real, imaginary).

    S5 (arXiv:2208.04933) and ConvS5 (arXiv:2310.19694). u is a pair of `(B, T, *S, P)`, the state
    of `(B, *S, P)`, `log_decay` of (P,), or of (B, T, P) for one of each token; its real part is in
    nats per token and not positive, its imaginary part in radians per token. All of the payload
    axes S (height and width of an image, or none) decay alike. `state` is x before the first token
    (zero if None); `reset` marks tokens before which it is forgotten. `chunk`, in tokens, is taken
    as by the other operations; nothing here goes by chunks, so none changes a number or a time.

    Returns x in the dtype of u and the state after the last token in at least float32. Raises
    ValueError for shapes that do not fit, NotImplementedError for an implementation that does not
    take the call.
    """
    check(u, log_decay, state, reset, chunk)
    exact = jnp.promote_types(jnp.float32, u[0].dtype)
    if state is None:
        zeros = jnp.zeros((u[0].shape[0], *u[0].shape[2:]), exact)
        state = zeros, zeros
    log_decay, state = jax.tree.map(lambda x: x.astype(exact), (log_decay, state))
    arguments = u, log_decay, state, reset, chunk
    return call("diagonal_scan", IMPLEMENTATIONS, implementation, *arguments)


def check(u, log_decay, state, reset, chunk):
    """Raise a ValueError that names the first shape or dtype that does not fit."""
    pairs = {"u": u, "log_decay": log_decay} | ({} if state is None else {"state": state})
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list):
            kind = getattr(pair, "dtype", type(pair).__name__)
            raise ValueError(f"{name} is {kind}; it must be a pair of arrays, (real, imaginary)")
        if len(pair) != 2:
            raise ValueError(f"{name} has {len(pair)} parts; it must have two, real and imaginary")
    if len(shape := u[0].shape) < 3:
        raise ValueError(f"u has shape {shape}; it needs batch, time and channels")
    batch, time, *payload, channels = shape
    if time == 0:
        raise ValueError(f"u {shape} holds no token; at least one is needed")
    if u[0].dtype != u[1].dtype:
        raise ValueError(f"u's parts are {u[0].dtype} and {u[1].dtype}; they must be alike")
    decay = (batch, time, channels) if log_decay[0].ndim == 3 else (channels,)
    expected = {"u": shape, "log_decay": decay, "state": (batch, *payload, channels)}
    for name, pair in pairs.items():
        for part, x in zip(("real", "imaginary"), pair, strict=True):
            what, wanted = f"the {part} part of {name}", expected[name]
            if x.shape != wanted:
                raise ValueError(f"{what} has shape {x.shape}, not {wanted}")
            checks.floats(**{what: (x, (len(wanted),))})
    checks.mask("reset", reset, (batch, time))
    checks.size("chunk", chunk)
