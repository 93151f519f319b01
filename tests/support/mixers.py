"""Every mixer of the library as the laws see it: how to draw its inputs, run it, and what it means.

`meaning` is the token recurrence written out once more, on its own, for float64.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scanax.sharding.ops import (
    attention,
    diagonal_scan,
    fixed_query,
    linear_attention,
    selective_scan,
)

ADVERSARIAL = np.array([0.0, -1e-4, -1.0, -30.0, -200.0])  # log decays, mixed in one tensor
UNIFORM = {"minus30": -30.0, "minus200": -200.0}
CASES = ("mixed", "mild", "minus10", *UNIFORM)
BATCH = 2


@dataclasses.dataclass(frozen=True)
class Mixer:
    """inputs = {"tokens": {name: (B, T, ...)}, "shared": {...}, "state": pytree of (B, ...)}."""

    name: str
    draw: Callable  # (rng, time, case) -> inputs in float64
    run: Callable  # (inputs, reset, schedule keywords) -> (y, state)
    meaning: Callable  # (inputs, reset) -> (y, state)
    schedules: tuple
    vanishing: tuple = ()  # inputs whose true gradient is below float32 for uniform decays


def draw_logs(rng, shape, case):
    if case in UNIFORM or case == "minus10":
        return np.full(shape, UNIFORM.get(case, -10.0))
    return -rng.uniform(0, 0.1, shape) if case == "mild" else rng.choice(ADVERSARIAL, shape)


def by_time(step, initial, fresh, inputs, reset):
    """Token after token: `fresh` replaces the state where a document begins."""

    def body(state, xs):
        token, start = xs
        state = jax.tree.map(
            lambda s, f: jnp.where(start.reshape(start.shape + (1,) * (s.ndim - 1)), f, s),
            state,
            fresh,
        )
        y, state = step(state, token)
        return state, y

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs["tokens"], reset))
    state, y = jax.lax.scan(body, initial, xs)
    return jnp.moveaxis(y, 0, 1), state


def heads_of(x, heads):
    return jnp.repeat(x, heads // x.shape[-2], axis=-2)


# Linear attention: H = 6 heads in groups.


def draw_linear(kind, groups, rng, time, case, heads=6, key=5, value=4):
    shape = {"constant": (heads,), "scalar": (BATCH, time, heads)}.get(
        kind, (BATCH, time, heads, key)
    )
    logs = draw_logs(rng, shape, case)
    tokens = {
        name: rng.normal(size=(BATCH, time, n, width))
        for name, n, width in zip("qkv", groups, (key, key, value), strict=True)
    }
    shared = {}
    (shared if kind == "constant" else tokens)["log_decay"] = logs
    return {
        "tokens": tokens,
        "shared": shared,
        "state": rng.normal(size=(BATCH, heads, key, value)),
    }


def run_linear(inputs, reset, **how):
    everything = inputs["tokens"] | inputs["shared"]
    return linear_attention(**everything, state=inputs["state"], reset=reset, **how)


def mean_linear(inputs, reset):
    heads = inputs["state"].shape[1]

    def step(state, token):
        q, k, v = (heads_of(token[name], heads) for name in "qkv")
        log = (token | inputs["shared"])["log_decay"]
        decay = jnp.exp(log)[..., None] if log.ndim == q.ndim else jnp.exp(log)[..., None, None]
        state = decay * state + k[..., :, None] * v[..., None, :]
        return jnp.sum(q[..., :, None] * state, axis=-2), state

    return by_time(step, inputs["state"], jnp.zeros_like(inputs["state"]), inputs, reset)


# Selective scan.


def draw_selective(rng, time, case, width=6, state=4):
    return {
        "tokens": {
            "u": rng.normal(size=(BATCH, time, width)),
            "delta": -draw_logs(rng, (BATCH, time, width), case),
            "B": rng.normal(size=(BATCH, time, state)),
            "C": rng.normal(size=(BATCH, time, state)),
        },
        "shared": {"A": -rng.uniform(0.5, 1, (width, state)), "D": rng.normal(size=width)},
        "state": rng.normal(size=(BATCH, width, state)),
    }


def run_selective(inputs, reset, **how):
    everything = inputs["tokens"] | inputs["shared"]
    return selective_scan(**everything, state=inputs["state"], reset=reset, **how)


def mean_selective(inputs, reset):
    A, D = inputs["shared"]["A"], inputs["shared"]["D"]

    def step(h, token):
        u, delta, B, C = (token[name] for name in ("u", "delta", "B", "C"))
        h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None, :]
        return jnp.sum(h * C[:, None, :], axis=-1) + D * u, h

    return by_time(step, inputs["state"], jnp.zeros_like(inputs["state"]), inputs, reset)


# Diagonal scan: complex numbers as pairs, all of a payload decaying alike.


def draw_diagonal(constant, payload, rng, time, case, channels=4):
    shape = (channels,) if constant else (BATCH, time, channels)
    log = {"log_re": draw_logs(rng, shape, case), "log_im": rng.normal(size=shape)}
    size = (*payload, channels)
    u = {part: rng.normal(size=(BATCH, time, *size)) for part in ("re", "im")}
    return {
        "tokens": u if constant else u | log,
        "shared": log if constant else {},
        "state": tuple(rng.normal(size=(BATCH, *size)) for _ in range(2)),
    }


def run_diagonal(inputs, reset, **how):
    x = inputs["tokens"] | inputs["shared"]
    u, log = (x["re"], x["im"]), (x["log_re"], x["log_im"])
    x, state = diagonal_scan(u, log, state=inputs["state"], reset=reset, **how)
    return jnp.stack(x, axis=-1), state


def mean_diagonal(inputs, reset):
    payload = inputs["state"][0].ndim - 2

    def step(state, token):
        token = token | inputs["shared"]
        log = token["log_re"] + 1j * token["log_im"]
        log = log.reshape(*log.shape[:-1], *(1,) * payload, log.shape[-1])
        x = jnp.exp(log) * (state[0] + 1j * state[1]) + token["re"] + 1j * token["im"]
        return jnp.stack([x.real, x.imag], axis=-1), (x.real, x.imag)

    fresh = jax.tree.map(jnp.zeros_like, inputs["state"])
    return by_time(step, inputs["state"], fresh, inputs, reset)


# Softmax mixers: `case` sets how far the scores spread instead of a decay.

SPREAD = {"mixed": 30.0, "mild": 1.0, "minus10": 3.0, "minus30": 10.0, "minus200": 1e-3}


def draw_fixed_query(rng, time, case, heads=4, groups=2, key=5, value=3):
    return {
        "tokens": {
            "k": rng.normal(size=(BATCH, time, groups, key)),
            "v": rng.normal(size=(BATCH, time, groups, value)),
        },
        "shared": {"q": SPREAD[case] * rng.normal(size=(heads, key))},
        "state": (
            rng.normal(size=(BATCH, heads)),
            rng.uniform(1, 2, (BATCH, heads)),
            rng.normal(size=(BATCH, heads, value)),
        ),
    }


def run_fixed_query(inputs, reset, **how):
    everything = inputs["tokens"] | inputs["shared"]
    return fixed_query(**everything, state=inputs["state"], reset=reset, **how)


def mean_fixed_query(inputs, reset):
    q = inputs["shared"]["q"]

    def step(state, token):
        m, u, w = state
        k, v = (heads_of(token[name], q.shape[0]) for name in "kv")
        score = jnp.sum(q * k, axis=-1) / np.sqrt(q.shape[1])
        top = jnp.maximum(m, score)
        old, new = jnp.exp(m - top), jnp.exp(score - top)
        u, w = old * u + new, old[..., None] * w + new[..., None] * v
        return w / u[..., None], (top, u, w)

    m, u, w = inputs["state"]
    fresh = jnp.full_like(m, -1e30), jnp.zeros_like(u), jnp.zeros_like(w)
    return by_time(step, (m, u, w), fresh, inputs, reset)


def draw_attention(rng, time, case, heads=4, groups=2, key=5, value=3):
    sizes = {"q": (heads, key), "k": (groups, key), "v": (groups, value)}
    tokens = {name: rng.normal(size=(BATCH, time, *size)) for name, size in sizes.items()}
    tokens["q"] *= SPREAD[case]
    return {"tokens": tokens, "shared": {}, "state": ()}


def run_attention(window, inputs, reset, **how):
    how = {"block": how["chunk"]} if "chunk" in how else how
    return attention(**inputs["tokens"], window=window, reset=reset, **how), ()


def mean_attention(window, inputs, reset):
    q, k, v = (inputs["tokens"][name] for name in "qkv")
    k, v = heads_of(k, q.shape[2]), heads_of(v, q.shape[2])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None, :]
    document = jnp.cumsum(reset, axis=1)
    seen = (s <= t) & (s > t - (window or q.shape[1])) & (document[:, :, None] == document[:, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v), ()


REFERENCES = ({"implementation": "reference"}, {"implementation": "associative"})
CHUNKS = tuple({"implementation": "xla", "chunk": size} for size in (1, 7, 16, 64, 131))
KERNELS = tuple({"implementation": "pallas_tpu", "chunk": size} for size in (16, 64))
SCHEDULES = REFERENCES + CHUNKS + KERNELS


def linear(name, kind, groups):
    return Mixer(
        name,
        partial(draw_linear, kind, groups),
        run_linear,
        mean_linear,
        SCHEDULES,
        ("log_decay", "state"),
    )


MIXERS = (
    linear("gla", "vector", (6, 3, 3)),
    linear("retention and lightning", "constant", (6, 6, 6)),
    linear("mamba2", "scalar", (2, 2, 6)),
    Mixer(
        "mamba",
        draw_selective,
        run_selective,
        mean_selective,
        SCHEDULES,
        ("delta", "A", "state"),
    ),
    *(
        Mixer(
            name,
            partial(draw_diagonal, constant, payload),
            run_diagonal,
            mean_diagonal,
            (*REFERENCES, {"implementation": "xla"}),
            ("log_re", "log_im", "state"),
        )
        for name, constant, payload in (("convs5", True, (3, 2)), ("s5", False, ()))
    ),
    Mixer("aaren", draw_fixed_query, run_fixed_query, mean_fixed_query, SCHEDULES),
    Mixer(
        "attention",
        draw_attention,
        partial(run_attention, None),
        partial(mean_attention, None),
        (REFERENCES[0], *CHUNKS, *KERNELS),
    ),
    Mixer(
        "window attention",
        draw_attention,
        partial(run_attention, 9),
        partial(mean_attention, 9),
        (REFERENCES[0], *CHUNKS, *KERNELS),
    ),
)
