"""Mamba's selective scan: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = h_t C_t + D u_t."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import checks
from ..dispatch import Implementation, call
from . import pallas_gpu, pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(pallas_tpu.selective_scan, pallas_tpu.refuse),
    "pallas_gpu": Implementation(pallas_gpu.selective_scan, pallas_gpu.refuse),
    "xla": Implementation(xla.selective_scan),
    "reference": Implementation(reference.selective_scan),
    "associative": Implementation(reference.selective_scan_associative),
}


def selective_scan(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    D: Float[Array, "D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = h_t C_t + D u_t.

    Mamba (arXiv:2312.00752). `delta` is the step after softplus (not negative), A is not positive;
    delta A is a log decay in nats per token.
    `state` is h before the first token (zero if None); `reset` marks tokens before which it is
    forgotten. `chunk` is the number of tokens a chunked implementation takes at a time.

    Returns y in the dtype of u and the state after the last token in at least float32. Raises
    ValueError for shapes that do not fit, NotImplementedError for an implementation that does not
    take the call.
    """
    check(u, delta, A, B, C, D, state, reset, chunk)
    exact = jnp.promote_types(jnp.float32, u.dtype)
    A = A.astype(exact)
    D = jnp.zeros(u.shape[2], exact) if D is None else D.astype(exact)
    state = jnp.zeros((u.shape[0], *A.shape), exact) if state is None else state.astype(exact)
    arguments = u, delta, A, B, C, D, state, reset, chunk
    return call("selective_scan", IMPLEMENTATIONS, implementation, *arguments)


def check(u, delta, A, B, C, D, state, reset, chunk):
    """Raise a ValueError that names the first shape that does not fit."""
    checks.floats(u=(u, (3,)), delta=(delta, (3,)), A=(A, (2,)), B=(B, (3,)), C=(C, (3,)))
    checks.floats(D=(D, (1,)), state=(state, (3,)))
    batch, time, width = u.shape
    if time == 0:
        raise ValueError(f"u {u.shape} holds no token; at least one is needed")
    expected = {
        "delta": (delta, u.shape),
        "A": (A, (width, A.shape[-1])),
        "B": (B, (batch, time, A.shape[-1])),
        "C": (C, (batch, time, A.shape[-1])),
        "D": (D, (width,)),
        "state": (state, (batch, *A.shape)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    checks.mask("reset", reset, (batch, time))
    checks.size("chunk", chunk)
