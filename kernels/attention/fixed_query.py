"""Attention whose query does not depend on the token: a softmax prefix scan with an O(1) state."""

from jaxtyping import Array, Bool, Float


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
):
    """y_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}, s_i = scale q . k_i  (Aaren, arXiv:2405.13956).

    The state is the softmax monoid's (maximum, normaliser, weighted values), each in at least
    float32. `scale` is K**-0.5 if None. Returns (y (B, T, H, V), state).
    """
    raise NotImplementedError  # being written
