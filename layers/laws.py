"""What every mixer obeys: a stream may be cut anywhere, documents do not see each other, and a mesh
changes nothing. `python -m scanax.selftest --mixer NAME` runs these laws, and so do the tests.

A law yields pairs of trees that must be equal up to rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from .depth import Depth

Pairs = Iterator[tuple[Any, Any]]
BATCH, TIME, CAPACITY = 4, 16, 16
CUTS = [7, *[1] * 9], [7, 2, 7]
STARTS = [0], [0, 9], [0, 6, 7, 8], [0, 2, 4, 5, 15]  # of the documents in each row
BAR = 1e-5  # of max|a - b| / max|b| in float32


def resets() -> jax.Array:
    """None in the first row; else where documents start, and once of two on a row's first token."""
    reset = np.zeros((BATCH, TIME), bool)
    for row, starts in enumerate(STARTS):
        reset[row, starts] = True
    reset[[0, 2, 3], 0] = False
    return jnp.asarray(reset)


class Trial:
    """A mixer, its input, and its jitted call; compiled once for each length."""

    def __init__(self, build: Callable[..., nnx.Module], width: int, dtype: DTypeLike = np.float32):
        """`build(width, depth=, dtype=, rngs=)` makes the mixer."""
        self.model: Any = build(width, depth=Depth(1, 2), dtype=dtype, rngs=nnx.Rngs(0))
        self.graph, self.params, self.rest = nnx.split(self.model, nnx.Param, ...)
        call = jax.jit(lambda p, x, state, reset: self.merged(p)(x, state, reset))
        self.run = lambda x, state, reset: call(self.params, x, state, reset)
        self.x = jax.random.normal(jax.random.key(1), (BATCH, TIME, width), dtype)
        self.none = jnp.zeros((BATCH, TIME), bool)

    def merged(self, params: Any) -> Any:
        """The mixer with these parameters."""
        return nnx.merge(self.graph, params, self.rest)

    def pieces(self, sizes: list[int], x: Any, reset: Any) -> tuple[Any, Any]:
        """Outputs and final state of the stream cut into `sizes`."""
        state, outputs, at = self.model.init_state(BATCH, CAPACITY, x.dtype), [], 0
        for size in sizes:
            y, state = self.run(x[:, at : at + size], state, reset[:, at : at + size])
            outputs.append(y)
            at += size
        return jnp.concatenate(outputs, axis=1), state


def cut_anywhere(trial: Trial) -> Pairs:
    """Prefill then decode, and pieces of odd lengths, give the full run and its state."""
    full, final = trial.run(trial.x, None, resets())
    for sizes in CUTS:
        y, state = trial.pieces(sizes, trial.x, resets())
        yield y, full
        if final is not None:
            yield state, final


def packed_is_alone(trial: Trial) -> Pairs:
    """Documents packed into a row give what each gives alone."""
    packed, _ = trial.run(trial.x, None, resets())
    for number in range(max(map(len, STARTS))):
        begin = [row[min(number, len(row) - 1)] for row in STARTS]
        end = [[*row[number + 1 :], TIME][0] for row in STARTS]
        alone = jnp.stack([jnp.roll(x, -b, axis=0) for x, b in zip(trial.x, begin, strict=True)])
        y, _ = trial.run(alone, None, trial.none)
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            yield packed[row, b:e], y[row, : e - b]


def reset_is_optional(trial: Trial) -> Pairs:
    """No reset is one that is False everywhere."""
    yield trial.run(trial.x, None, None)[0], trial.run(trial.x, None, trial.none)[0]


def state_is_a_carry(trial: Trial) -> Pairs:
    """A state keeps its structure, shapes and dtypes, rows first, and y those of x: 1 if so."""

    def about(tree):
        return [(str(p), x.shape, x.dtype) for p, x in jax.tree.leaves_with_path(tree)]

    state = trial.model.init_state(BATCH, CAPACITY, trial.x.dtype)
    for time in (1, 7):
        x, reset = trial.x[:, :time], trial.none[:, :time]
        y, after = jax.eval_shape(trial.run, x, state, reset)
        kept = about(after) == about(state) and about(y) == about(x)
        rows = all(leaf.shape[:1] == (BATCH,) for leaf in jax.tree.leaves(after))
        yield jnp.asarray(kept and rows, jnp.float32), jnp.ones((), jnp.float32)


def padded_is_alone(trial: Trial) -> Pairs:
    """Prompts padded on the left go on as if alone."""
    padding = [0, 3, 6, 5]
    reset = np.zeros((BATCH, TIME), bool)
    reset[np.arange(BATCH), padding] = True
    y, _ = trial.pieces(CUTS[0], trial.x, jnp.asarray(reset))
    alone = jnp.stack([jnp.roll(x, -p, axis=0) for x, p in zip(trial.x, padding, strict=True)])
    full, _ = trial.run(alone, None, trial.none)
    for row, p in enumerate(padding):
        yield y[row, p:], full[row, : TIME - p]


def not_finite_stays(trial: Trial) -> Pairs:
    """A document that is not finite is so itself, and reaches no other."""
    bad = trial.x.at[1:3, 3].set(jnp.nan)
    for run in (
        lambda x: trial.run(x, None, resets())[0],
        lambda x: trial.pieces(CUTS[0], x, resets())[0],
        lambda x: trial.pieces(CUTS[1], x, resets())[0],
    ):
        y, good = run(bad), run(trial.x)
        yield jnp.isnan(y[1:3, 3]).mean(), jnp.ones(())
        yield (y[0], y[1, 9:], y[2, 6:], y[3]), (good[0], good[1, 9:], good[2, 6:], good[3])


def gradients_pass(trial: Trial) -> Pairs:
    """Those of two pieces, with documents that run over the cut, are those of the full run."""
    ct = jax.random.normal(jax.random.key(2), trial.x.shape, trial.x.dtype)

    def full(params, x):
        return jnp.sum(trial.merged(params)(x, None, resets())[0] * ct)

    def pieces(params, x):
        model = trial.merged(params)
        state = model.init_state(BATCH, CAPACITY, x.dtype)
        first, state = model(x[:, :7], state, resets()[:, :7])
        second, _ = model(x[:, 7:], state, resets()[:, 7:])
        return jnp.sum(jnp.concatenate([first, second], axis=1) * ct)

    found = jax.jit(lambda *x: [jax.grad(f, (0, 1))(*x) for f in (pieces, full)])
    yield tuple(found(trial.params, trial.x))


LAWS: dict[str, Callable[[Trial], Pairs]] = {
    "cut anywhere": cut_anywhere,
    "state is a carry": state_is_a_carry,
    "reset is optional": reset_is_optional,
    "packed is alone": packed_is_alone,
    "padded is alone": padded_is_alone,
    "not finite stays": not_finite_stays,
    "gradients pass": gradients_pass,
}


def devices_change_nothing(trial: Trial, over: Any) -> Pairs:
    """Outputs, state and gradients over a mesh, of which the rows, time and heads are cut."""

    def both(params, x):
        def loss(params, x):
            y, state = trial.merged(params)(x, None, resets())
            return jnp.sum(y**2), (y, state)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    alone = jax.jit(both)(trial.params, trial.x)
    with jax.set_mesh(over):
        yield jax.device_get(jax.jit(both)(trial.params, trial.x)), jax.device_get(alone)
