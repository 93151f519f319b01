"""Linear attention with decay: S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import checks
from ..dispatch import Implementation, call
from ..documents import isolate
from . import pallas_gpu, pallas_tpu, reference, xla

IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(pallas_tpu.linear_attention, pallas_tpu.refuse),
    "pallas_gpu": Implementation(pallas_gpu.linear_attention, pallas_gpu.refuse),
    "xla": Implementation(xla.linear_attention),
    "reference": Implementation(reference.linear_attention),
    "associative": Implementation(reference.linear_attention_associative),
}
ISOLATED = {"pallas_tpu", "pallas_gpu", "xla"}


def linear_attention(
    q: Float[Array, "B T Gq K"],
    k: Float[Array, "B T Gk K"],
    v: Float[Array, "B T Gv V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | Float[Array, "B T H K"],
    *,
    state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t; the token is included, no scale.

    RetNet and Lightning (log_decay of shape (H,); arXiv:2307.08621, arXiv:2401.04658), Mamba-2
    (B, T, H; arXiv:2405.21060), GLA (B, T, H, K; arXiv:2312.06635).

    H is the number of heads of log_decay and the largest number of groups of q, k and v, each of
    which divides it: head h reads group h G // H. log_decay is in nats per token, finite and not
    positive.
    `state` is S before the first token (zero if None); `reset` marks tokens before which it is
    forgotten. `chunk` is the number of tokens a chunked implementation takes at a time.

    Returns y in the dtype of the inputs and the state after the last token in at least float32.
    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that
    does not take the call.
    """
    checks.floats(
        q=(q, (4,)), k=(k, (4,)), v=(v, (4,)), log_decay=(log_decay, (1, 3, 4)), state=(state, (4,))
    )
    heads = max(q.shape[2], k.shape[2], v.shape[2], log_decay.shape[2 * (log_decay.ndim > 1)])
    check(q, k, v, log_decay, heads, state, reset, chunk)
    dtype = jnp.result_type(q, k, v)
    exact = jnp.promote_types(jnp.float32, dtype)
    if state is None:
        state = jnp.zeros((q.shape[0], heads, q.shape[3], v.shape[3]), exact)
    state, log_decay = state.astype(exact), log_decay.astype(exact)

    def run(q, k, v, log_decay, state, reset):
        return call(
            "linear_attention",
            IMPLEMENTATIONS,
            implementation,
            q,
            k,
            v,
            log_decay,
            state,
            reset,
            chunk,
        )

    if reset is None or implementation in IMPLEMENTATIONS.keys() - ISOLATED:
        return run(q, k, v, log_decay, state, reset)
    if log_decay.ndim == 1:
        return isolate(lambda x, d, s, r: run(*x, d, s, r), (q, k, v), log_decay, state, reset)
    return isolate(lambda x, _, s, r: run(*x, s, r), (q, k, v, log_decay), (), state, reset)


def check(q, k, v, log_decay, heads, state, reset, chunk):
    """Raise a ValueError that names the first shape that does not fit."""
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} differ in batch or length")
    if q.shape[1] == 0:
        raise ValueError(f"q {q.shape} holds no token; at least one is needed")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has {q.shape[3]} features and k {k.shape[3]}; they must be equal")
    for name, groups in zip("qkv", (q.shape[2], k.shape[2], v.shape[2]), strict=True):
        if groups == 0 or heads % groups:
            raise ValueError(f"{name} has {groups} heads, which does not divide {heads}")
    allowed = (heads,), (*q.shape[:2], heads), (*q.shape[:2], heads, q.shape[3])
    if log_decay.shape not in allowed:
        raise ValueError(f"log_decay has shape {log_decay.shape}, not one of {allowed}")
    expected = (q.shape[0], heads, q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state has shape {state.shape}, not {expected}")
    checks.mask("reset", reset, q.shape[:2])
    checks.size("chunk", chunk)
