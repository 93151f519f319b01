"""Softmax attention, and its fixed-query form that needs no cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .. import checks
from ..dispatch import Implementation, call
from ..documents import starts
from . import pallas_gpu, pallas_tpu, reference, xla
from .fixed_query import fixed_query
from .xla import delta, visits

__all__ = ["attention", "attention_gradients", "delta", "fixed_query", "visits"]

IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(pallas_tpu.attention, pallas_tpu.refuse),
    "pallas_gpu": Implementation(pallas_gpu.attention, pallas_gpu.refuse),
    "xla": Implementation(xla.attention),
    "reference": Implementation(reference.attention),
}
GRADIENTS = {
    "pallas_tpu": Implementation(pallas_tpu.gradients, pallas_tpu.refuse_gradients),
    "pallas_gpu": Implementation(pallas_gpu.gradients, pallas_gpu.refuse_gradients),
    "xla": Implementation(xla.gradients),
}


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    reset: Bool[Array, "B T"] | None = None,
    q_index: Int[Array, "B T"] | None = None,
    q_start: Int[Array, "B T"] | None = None,
    kv_index: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
    block: int | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """y_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys that t may see  (arXiv:2307.08691).

    Every key has an index (0..S-1 unless `kv_index` gives another; -1 marks an empty cache slot)
    and every query sees the keys whose index is in [first, last]: last is its own index (causal)
    or the end, first is the start of its document and, with a `window` in tokens, at most
    window - 1 before its own. A query that may see nothing returns 0 and a log-sum-exp of -inf.

    `scale` is K**-0.5 if None. Head h reads key and value group h G // H. `reset` marks documents
    when q and k are the same tokens; a cache gives q_index, q_start and kv_index instead.
    `return_lse` adds the log-sum-exp of the scaled scores in at least float32. `block` is the
    number of tokens a blockwise implementation takes at a time. Returns y in `dtype`, that of q if
    None; results over parts of the keys, which are still to be merged, want float32.
    A non-finite key, value, query or cotangent reaches exactly what its mask lets it reach.
    Raises ValueError for arguments that do not fit, NotImplementedError for an implementation that
    does not take the call.
    """
    check(q, k, v, causal, window, reset, q_index, q_start, kv_index, block)
    first, last = visible(q.shape[:2], causal, window, reset, q_index, q_start)
    if kv_index is None:
        kv_index = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
    common = jnp.result_type(q, k, v)
    y, lse = call(
        "attention",
        IMPLEMENTATIONS,
        implementation,
        *(x.astype(common) for x in (q, k, v)),
        first,
        last,
        kv_index.astype(jnp.int32),
        q.shape[3] ** -0.5 if scale is None else float(scale),
        block,
        jnp.dtype(q.dtype if dtype is None else dtype),
    )
    return (y, lse) if return_lse else y


def attention_gradients(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    dy: Float[Array, "B T H V"],
    lse: Float[Array, "B T H"],
    delta: Float[Array, "B T H"],
    *,
    q_index: Int[Array, "B T"],
    q_start: Int[Array, "B T"],
    kv_index: Int[Array, "B S"],
    scale: float | None = None,
    block: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B S G K"], Float[Array, "B S G V"]]:
    """What these keys contribute to the gradients to q, k and v, in the dtype of lse.

    The queries may have seen other keys too: `lse` is the log-sum-exp over all of them, and
    `delta(y, dy, dlse)` is of the output over all of them. The other arguments are `attention`'s;
    kernels for Hopper have tiles of their own here, whatever the `block` of their forward is.
    """
    common = jnp.result_type(q, k, v)
    return call(
        "attention_gradients",
        GRADIENTS,
        implementation,
        *(x.astype(common) for x in (q, k, v)),
        *(dy, lse, delta),
        *visible(q.shape[:2], True, None, None, q_index, q_start),
        kv_index.astype(jnp.int32),
        q.shape[3] ** -0.5 if scale is None else scale,
        block,
    )


def visible(shape, causal, window, reset, q_index=None, q_start=None):
    """Index of the first and of the last key that each query may see, int32 (B, T) each."""
    index = jnp.arange(shape[1], dtype=jnp.int32)
    end = jnp.full(shape, jnp.iinfo(jnp.int32).max, jnp.int32)
    if q_index is None:
        q_index = jnp.broadcast_to(index, shape)
    if reset is not None:
        q_start = starts(reset)
        following = jax.lax.cummin(jnp.where(reset, index, shape[1]), axis=1, reverse=True)
        end = end.at[:, :-1].set(following[:, 1:] - 1)
    first = jnp.zeros(shape, jnp.int32) if q_start is None else q_start.astype(jnp.int32)
    last = q_index.astype(jnp.int32) if causal else end
    if window is not None:
        reach = min(window - 1, jnp.iinfo(jnp.int32).max)
        first = jnp.maximum(first, q_index.astype(jnp.int32) - reach)
    return jnp.maximum(first, 0), last


def check(q, k, v, causal, window, reset, q_index, q_start, kv_index, block):
    """Raise a ValueError that names the first argument that does not fit."""
    checks.floats(q=(q, (4,)), k=(k, (4,)), v=(v, (4,)))
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} differ in batch, length or heads"
        )
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError(f"q {q.shape} and k {k.shape}: at least one token is needed in each")
    if not q.shape[3]:
        raise ValueError(f"q {q.shape} has no features; at least one is needed")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has {q.shape[3]} features and k {k.shape[3]}; they must be equal")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k and v have {k.shape[2]} heads, which does not divide {q.shape[2]}")
    checks.size("window", window)
    checks.size("block", block)
    for name, x, shape in (
        ("q_index", q_index, q.shape[:2]),
        ("q_start", q_start, q.shape[:2]),
        ("kv_index", kv_index, k.shape[:2]),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}, not {shape}")
    checks.mask("reset", reset, q.shape[:2])
    same = q.shape[1] == k.shape[1] and kv_index is None
    if reset is not None and not (same and q_index is None and q_start is None):
        raise ValueError(
            "reset goes with as many queries as keys and without q_index, q_start, kv_index"
        )
    if (causal or window is not None) and not same and q_index is None:
        raise ValueError(
            f"a causal or windowed call with {q.shape[1]} queries and {k.shape[1]} keys, kv_index "
            f"{'not ' * (kv_index is None)}given, needs q_index: where the queries stand"
        )
