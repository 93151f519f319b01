"""Time and temporaries of each operation against a plain one, in one run on this machine.

python -m scanax.experiments.benchmark
python -m scanax.experiments.benchmark --ops "gla" "mamba" --repeats 9 --out table.json
python -m scanax.experiments.benchmark --ops grouped-8 grouped-64 --batch 1 --length 1024

The plain one is a scan token by token under automatic differentiation; for `attention` the whole
matrix of scores, for the grouped matmuls (8 or 64 experts share the rows) `jax.lax.ragged_dot`.

Figures are medians of runs that alternate with the baseline's, so that a machine that slows down
slows both; the ratio is the figure to compare. The bound beside each is the least time that the
operation's arithmetic takes at this machine's measured float32 matrix rate.
"""

import os
import sys

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # this folder's files must not shadow installed libraries

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scanax.kernels import (
    attention,
    fixed_query,
    grouped_matmul,
    linear_attention,
    selective_scan,
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time operations against a plain implementation under automatic differentiation."""

    ops: tuple[str, ...] = ("gla", "mamba2", "mamba", "aaren", "attention", "grouped-8")
    """Which operations to time."""
    batch: int = 2
    """Rows."""
    length: int = 2048
    """Tokens a row."""
    repeats: int = 5
    """Timed runs of each; the median is reported."""
    out: Path | None = None
    """A file to write the table to as JSON (none: print only)."""


def token_scan(step: Callable, state: Any, tokens: Any) -> tuple[Any, Any]:
    """The baseline: one `lax.scan` step a token, with nothing clever in the backward."""
    state, y = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1), state


def linear_step(state, token):
    q, k, v, log = token
    decay = jnp.exp(log).reshape(log.shape + (1,) * (state.ndim - log.ndim))
    state = decay * state + k[..., :, None] * v[..., None, :]
    return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")


def problems(batch: int, length: int) -> dict[str, tuple[Callable, Callable, tuple, int]]:
    """name: (ours, baseline, arguments, multiply-adds of the forward pass)."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    heads, width = 4, 64
    q, k, v = (normal(batch, length, heads, width) for _ in range(3))
    state = normal(batch, heads, width, width)
    logs = jax.nn.log_sigmoid(normal(batch, length, heads, width))
    tokens = batch * length * heads
    linear = (
        lambda q, k, v, g, s: linear_attention(q, k, v, g, state=s),
        lambda q, k, v, g, s: token_scan(linear_step, s, (q, k, v, g)),
    )

    channels, states = 512, 16
    u, delta = normal(batch, length, channels), jax.nn.softplus(normal(batch, length, channels) - 4)
    A = -jnp.broadcast_to(jnp.arange(1.0, states + 1, dtype=jnp.float32), (channels, states))
    B, C = normal(batch, length, states), normal(batch, length, states)

    def selective_baseline(u, delta, A, B, C):
        def step(h, token):
            u, delta, B, C = token
            h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
            return h, jnp.einsum("bdn,bn->bd", h, C, precision="highest")

        return token_scan(step, jnp.zeros((batch, *A.shape), jnp.float32), (u, delta, B, C))

    def aaren_baseline(query, k, v):
        def step(state, token):
            (m, n, w), (k, v) = state, token
            score = jnp.einsum("hk,bhk->bh", query, k, precision="highest") * width**-0.5
            top = jnp.maximum(m, score)
            old, new = jnp.exp(m - top), jnp.exp(score - top)
            n, w = old * n + new, old[..., None] * w + new[..., None] * v
            return (top, n, w), w / n[..., None]

        zero = jnp.zeros((batch, heads), jnp.float32)
        return token_scan(step, (zero - 1e30, zero, jnp.zeros_like(v[:, 0])), (k, v))

    def dense_attention(q, k, v):
        scores = jnp.einsum("bthk,bshk->bhts", q, k, precision="highest") * width**-0.5
        seen = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshv->bthv", weights, v, precision="highest")

    def grouped(experts, features=256, hidden=512):
        rows = batch * length
        sizes = rng.multinomial(rows, np.full(experts, 1 / experts))
        x, w = normal(rows, features), normal(experts, features, hidden)
        return (
            grouped_matmul,
            lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes, precision="highest"),
            (x, w, jnp.asarray(sizes, jnp.int32)),
            rows * features * hidden,
        )

    return {
        "gla": (*linear, (q, k, v, logs, state), tokens * 2 * width * width),
        "mamba2": (*linear, (q, k, v, logs[..., 0], state), tokens * 2 * width * width),
        "mamba": (
            selective_scan,
            selective_baseline,
            (u, delta, A, B, C),
            batch * length * channels * states * 3,
        ),
        "aaren": (fixed_query, aaren_baseline, (normal(heads, width), k, v), tokens * 2 * width),
        "attention": (attention, dense_attention, (q, k, v), tokens * width * length),
        "grouped-8": grouped(8),
        "grouped-64": grouped(64),
    }


def compile_both(run: Callable, arguments: tuple) -> tuple[Any, Any]:
    """The forward pass, and with it the gradient of a sum of squares to every float argument."""

    def loss(*args):
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(run(*args)))

    floats = (i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))
    gradient = jax.grad(loss, argnums=tuple(floats))
    forward, both = (jax.jit(f).lower(*arguments).compile() for f in (run, gradient))
    return forward, both


def seconds(call: Callable, arguments: tuple) -> float:
    """The second of two runs: the first pays for what ran before it, memory freed late too."""
    jax.block_until_ready(call(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - begin


def matrix_rate() -> float:
    """float32 multiply-adds a second in one large matrix product."""
    x = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    return 1024**3 / min(seconds(product, (x,)) for _ in range(5))


def compare(problem: tuple, repeats: int, rate: float) -> dict[str, float]:
    """Medians in milliseconds, temporaries in megabytes, and ratios to the baseline."""
    ours, baseline, arguments, work = problem
    compiled = {"ours": compile_both(ours, arguments), "base": compile_both(baseline, arguments)}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for name, pair in compiled.items():
            for i, call in enumerate(pair):
                times.setdefault((name, i), []).append(seconds(call, arguments))
    median = {key: 1e3 * statistics.median(spent) for key, spent in times.items()}
    memory = {n: c[1].memory_analysis().temp_size_in_bytes / 1e6 for n, c in compiled.items()}
    return {
        "forward_ms": median["ours", 0],
        "forward_bound_ms": 1e3 * work / rate,
        "forward_ratio": median["ours", 0] / median["base", 0],
        "both_ms": median["ours", 1],
        "both_ratio": median["ours", 1] / median["base", 1],
        "temporaries_mb": memory["ours"],
        "temporaries_ratio": memory["ours"] / memory["base"],
    }


def main() -> None:
    flags = tyro.cli(Benchmark, description=__doc__)
    known = problems(1, 1)
    unknown = [op for op in flags.ops if op not in known]
    if unknown or min(flags.batch, flags.length, flags.repeats) < 1:
        what = (
            f"--ops {unknown[0]}: not one of {', '.join(known)}"
            if unknown
            else (
                f"--batch {flags.batch}, --length {flags.length} and --repeats {flags.repeats}"
                " must be at least 1"
            )
        )
        print(what, file=sys.stderr)
        sys.exit(2)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, B={flags.batch} T={flags.length} float32")
    rate, table = matrix_rate(), {}
    chosen = problems(flags.batch, flags.length)
    for name in flags.ops:
        table[name] = compare(chosen[name], flags.repeats, rate)
        if len(table) == 1:
            print("| operation | " + " | ".join(table[name]) + " |")
            print("|---" * (len(table[name]) + 1) + "|")
        print(
            f"| {name} | " + " | ".join(f"{x:.3g}" for x in table[name].values()) + " |", flush=True
        )
    if flags.out:
        flags.out.write_text(json.dumps({"device": device.device_kind, "ops": table}, indent=1))


if __name__ == "__main__":
    main()
