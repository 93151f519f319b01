"""Attention whose query does not depend on the token: a softmax prefix scan with an O(1) state."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import checks
from ..dispatch import Implementation, call
from ..documents import isolate
from ..monoid import LOWEST
from . import fixed_query_pallas_gpu as pallas_gpu
from . import fixed_query_pallas_tpu as pallas_tpu
from . import fixed_query_reference as reference
from . import fixed_query_xla as xla

IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(pallas_tpu.fixed_query, pallas_tpu.refuse),
    "pallas_gpu": Implementation(pallas_gpu.fixed_query, pallas_gpu.refuse),
    "xla": Implementation(xla.fixed_query),
    "reference": Implementation(reference.fixed_query),
    "associative": Implementation(reference.fixed_query_associative),
}
ISOLATED = {"pallas_tpu", "pallas_gpu", "xla"}


def fixed_query(
    q: Float[Array, "H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float | None = None,
    state: tuple[Float[Array, "B H"], Float[Array, "B H"], Float[Array, "B H V"]] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "B T H V"],
    tuple[Float[Array, "B H"], Float[Array, "B H"], Float[Array, "B H V"]],
]:
    """y_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}, s_i = scale q . k_i  (arXiv:2405.13956).

    Aaren. Head h reads key and value group h G // H; `scale` is K**-0.5 if None. The state is the
    softmax monoid's (maximum, normaliser, weighted values), each in at least float32: of none if
    None. `reset` marks tokens before which it is forgotten. `chunk` is the number of tokens a
    chunked implementation takes at a time.

    Returns y in the dtype of the inputs and the state after the last token. The normaliser grows
    with the number of tokens, and float32 stops counting equal scores at 2**24 of them. Raises
    ValueError for shapes that do not fit, NotImplementedError for an implementation that does not
    take the call.
    """
    check(q, k, v, state, reset, chunk)
    exact = jnp.promote_types(jnp.float32, jnp.result_type(q, k, v))
    scale = q.shape[1] ** -0.5 if scale is None else float(scale)
    if state is None:
        u = jnp.zeros((k.shape[0], q.shape[0]), exact)
        state = jnp.full_like(u, LOWEST), u, jnp.zeros((*u.shape, v.shape[3]), exact)
    m, u, w = (x.astype(exact) for x in state)

    def run(tokens, q, state, reset):
        return call(
            "fixed_query", IMPLEMENTATIONS, implementation, q, *tokens, scale, state, reset, chunk
        )

    if reset is None or implementation in IMPLEMENTATIONS.keys() - ISOLATED:
        return run((k, v), q, (m, u, w), reset)
    return isolate(run, (k, v), q, (m, u, w), reset)


def check(q, k, v, state, reset, chunk):
    """Raise a ValueError that names the first shape that does not fit."""
    checks.floats(q=(q, (2,)), k=(k, (4,)), v=(v, (4,)))
    if state is not None and not (isinstance(state, tuple | list) and len(state) == 3):
        of = f" of {len(state)}" if isinstance(state, tuple | list) else ""
        raise ValueError(
            f"state is a {type(state).__name__}{of}; it must be a tuple of three, (m, u, w)"
        )
    for name, x in zip("muw", state or (), strict=False):
        checks.floats(**{f"state's {name}": (x, (x.ndim,))})  # its shapes are named together
    if not q.shape[1]:
        raise ValueError(f"q {q.shape} has no features; at least one is needed")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} differ in batch, length or heads")
    if k.shape[1] == 0:
        raise ValueError(f"k {k.shape} holds no token; at least one is needed")
    if q.shape[1] != k.shape[3]:
        raise ValueError(f"q has {q.shape[1]} features and k {k.shape[3]}; they must be equal")
    if k.shape[2] == 0 or q.shape[0] % k.shape[2]:
        raise ValueError(f"k and v have {k.shape[2]} heads, which does not divide {q.shape[0]}")
    rows = (k.shape[0], q.shape[0])
    expected = (rows, rows, (*rows, v.shape[3]))
    if state is not None and tuple(x.shape for x in state) != expected:
        raise ValueError(f"state has shapes {tuple(x.shape for x in state)}, not {expected}")
    checks.mask("reset", reset, k.shape[:2])
    checks.size("chunk", chunk)
