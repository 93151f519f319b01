"""Check an installation: every operation and implementation on this machine, against float64.

python -m scanax.selftest                             # all operations
python -m scanax.selftest --only attention            # those whose name contains this
python -m scanax.selftest --mixer gla                 # the laws of one mixer, instead
python -m scanax.selftest --mixer my_file:MyMixer     # of your own, too

A minute or two. Each line is one implementation of one operation on one kind of device: the
relative errors of its values and gradients against the token recurrence in float64, or why it does
not run here. On a CPU the kernels for TPUs also run interpreted, and with several devices each
operation runs once with its sequence spread over all of them. Exit status 1 if an error is over its
bar: 1e-5 for values and 1e-4 for gradients in float32; in bfloat16, in root mean square, 0.005 and
0.006. 2 if something given is wrong.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import kernels
from .kernels import dispatch
from .kernels.attention import IMPLEMENTATIONS as ATTENTION
from .kernels.attention.fixed_query import IMPLEMENTATIONS as FIXED_QUERY
from .kernels.diagonal_scan import IMPLEMENTATIONS as DIAGONAL_SCAN
from .kernels.grouped_matmul import IMPLEMENTATIONS as GROUPED_MATMUL
from .kernels.linear_attention import IMPLEMENTATIONS as LINEAR_ATTENTION
from .kernels.selective_scan import IMPLEMENTATIONS as SELECTIVE_SCAN
from .layers import laws
from .models import LM, LMConfig, split
from .models.block import MIXERS
from .models.partition import specs
from .models.pattern import imported
from .sharding import mesh, ops

IMPLEMENTATIONS = {
    "linear_attention": LINEAR_ATTENTION,
    "selective_scan": SELECTIVE_SCAN,
    "diagonal_scan": DIAGONAL_SCAN,
    "fixed_query": FIXED_QUERY,
    "attention": ATTENTION,
    "grouped_matmul": GROUPED_MATMUL,
}
B, T, H, G, K = 2, 60, 4, 2, 64  # 60 tokens divide over 2 to 6 devices
CHUNK = 16
LOG_DECAYS = 0.0, -1e-4, -1.0, -30.0, -200.0
BARS = {"float32": (1e-5, 1e-4), "bfloat16": (0.005, 0.006)}
WIDE = ("state", "log_decay", "A", "D")  # never in less than float32
DEFINITIONS = ("reference", "associative")  # in float32 only
TPU_KERNELS = ("pallas_tpu", "megablox")
INTERPRETED = dispatch.Target("tpu", "TPU v5 lite", interpret=True)
QUICK = {"xla_backend_optimization_level": 0}  # what no one runs on a CPU takes its LLVM a minute
Case = tuple[str, str, dict[str, Any], dict[str, Any]]


def cases() -> Iterator[Case]:
    """(name, operation, what is differentiated, in float64, and the other arguments)."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape)

    reset = rng.random((B, T)) < 0.05
    chunk = {"reset": reset, "chunk": CHUNK}
    qkv = {name: normal(B, T, n, K) for name, n in zip("qkv", (H, G, H), strict=True)}
    for kind, shape in (
        ("vector decay", (B, T, H, K)),
        ("scalar decay", (B, T, H)),
        ("constant decay", (H,)),
    ):
        floats = qkv | {"log_decay": rng.choice(LOG_DECAYS, shape), "state": normal(B, H, K, K)}
        yield f"linear_attention, {kind}", "linear_attention", floats, chunk
    floats = {name: normal(B, T, 32) for name in ("u", "delta")}
    floats["delta"] = -rng.choice(LOG_DECAYS, (B, T, 32))
    floats |= {"B": normal(B, T, 16), "C": normal(B, T, 16), "D": normal(32)}
    floats |= {"A": -rng.uniform(0.5, 1, (32, 16)), "state": normal(B, 32, 16)}
    yield "selective_scan", "selective_scan", floats, chunk
    for kind, tokens in (("constant decay", ()), ("decay by token", (B, T))):
        floats = {"u": (normal(B, T, 3, 4, 16), normal(B, T, 3, 4, 16))}
        floats["log_decay"] = (rng.choice(LOG_DECAYS, (*tokens, 16)), normal(*tokens, 16))
        floats["state"] = (normal(B, 3, 4, 16), normal(B, 3, 4, 16))
        yield f"diagonal_scan, {kind}", "diagonal_scan", floats, {"reset": reset}
    floats = {"q": normal(H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, K)}
    yield "fixed_query", "fixed_query", floats, chunk
    block = {"reset": reset, "block": CHUNK}
    floats = {"q": normal(B, T, H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, K)}
    yield "attention", "attention", floats, block
    yield "attention, window", "attention", floats, block | {"window": 9}
    one = floats | {"q": normal(B, 1, H, K)}
    yield (
        "attention, one query",
        "attention",
        one,
        {
            "q_index": np.array([[T - 1], [20]], np.int32),
            "block": CHUNK,
        },
    )
    floats = {"x": normal(B * T, 32), "w": normal(5, 32, 48)}
    sizes = np.array([50, 0, 3, 41, B * T - 96], np.int32)  # and two rows of no group
    yield "grouped_matmul", "grouped_matmul", floats, {"sizes": sizes}


def both(run: Callable, options: dict | None = None) -> Callable:
    """(inputs, cotangents) -> values, and gradients to every input."""

    def call(floats, cotangents):
        out, pull = jax.vjp(lambda x: run(**x), floats)
        return out, pull(cotangents)[0]

    return jax.jit(call, compiler_options=options)


def rounded(floats: dict, dtype: str) -> dict:
    def one(name, x):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if name in WIDE else dtype), x)

    return {name: one(name, x) for name, x in floats.items()}


class Problem:
    """One case in one dtype after another, and its answer by the definition in float64."""

    def __init__(self, case: Case):
        self.name, self.op, self.given, self.others = case
        self.definition = both(self.call("reference"), QUICK)

    def round(self, dtype: str, cpu: Any) -> None:
        """Take inputs of this dtype."""
        self.dtype, self.floats = dtype, rounded(self.given, dtype)
        out = jax.eval_shape(lambda x: self.call("reference")(**x), self.floats)
        rng = np.random.default_rng(1)
        self.cotangents = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), out
        )
        given = jax.tree.map(np.asarray, (self.floats, self.cotangents))
        with jax.enable_x64(True), jax.default_device(cpu):
            exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), given)
            self.answer = jax.tree.map(np.asarray, self.definition(*exact))

    def call(self, implementation: str | None, module: Any = kernels) -> Callable:
        how = {} if implementation is None else {"implementation": implementation}

        def run(**floats):
            others = {
                name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
                for name, x in self.others.items()
            }
            return getattr(module, self.op)(**floats, **others, **how)

        return run

    def refusal(self, implementation: str) -> str | None:
        """Why an implementation does not take this call on the device that is traced for."""
        try:
            jax.eval_shape(lambda x: self.call(implementation)(**x), self.floats)
        except NotImplementedError as error:
            return str(error).rpartition(f"{implementation}: ")[2]
        except Exception:  # it takes the call and is broken: its row will say how
            return None
        return None

    def errors(self, run: Callable, options: dict | None) -> tuple[float, float]:
        """(of the values, of the gradients): the largest of any array."""
        values, gradients = both(run, options)(self.floats, self.cotangents)
        return self.largest(values, self.answer[0]), self.largest(gradients, self.answer[1])

    def largest(self, got: Any, true: Any) -> float:
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True)
        return max(self.error(np.asarray(x), y) for x, y in pairs)

    def error(self, x: np.ndarray, true: np.ndarray) -> float:
        difference = x.astype(np.float64) - true
        if self.dtype == "float32":
            error = np.abs(difference).max() / np.abs(true).max()
        else:
            error = np.sqrt(np.mean(difference**2) / np.mean(true**2))
        return float(error) if np.isfinite(error) else float("inf")


def rows(problem: Problem, over: Any) -> Iterator[tuple[str, str, Callable | None, Any, str]]:
    """(implementation, where, what to run or None, under which context, why not)."""
    here = dispatch.target()
    for name in IMPLEMENTATIONS[problem.op]:
        if problem.dtype != "float32" and name in DEFINITIONS:
            continue
        reason = problem.refusal(name)
        if reason is None:
            yield name, here.kind, problem.call(name), dispatch.on(here), ""
            continue
        yield name, here.kind, None, dispatch.on(here), reason
        with dispatch.on(INTERPRETED):
            interpreted = name in TPU_KERNELS and problem.refusal(name) is None
        if interpreted and here.platform == "cpu":
            yield name, "interpreted", problem.call(name), dispatch.on(INTERPRETED), ""
    if over is not None and hasattr(ops, problem.op):
        where = f"{over.size} x {here.kind}"
        yield "over seq", where, problem.call(None, ops), jax.set_mesh(over), ""


def run(only: str = "") -> int:
    """Print the table; how many rows are over their bar. ValueError: no CPU to compute answers."""
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise ValueError(
            "the answers are computed on the CPU, which JAX_PLATFORMS hides; "
            f"add it: JAX_PLATFORMS={jax.default_backend()},cpu"
        ) from None
    count = max(n for n in (1, 2, 3, 4, 5, 6) if n <= len(jax.devices()))
    over = mesh.make(f"seq={count}") if count > 1 else None
    print(f"jax {jax.__version__}, {len(jax.devices())} x {dispatch.target().kind}")
    line = "{:34} {:12} {:9} {:16} {:>9} {:>9}  {}"
    print(line.format("operation", "by", "dtype", "on", "values", "gradients", ""))
    failed, begin = 0, time.monotonic()
    for case in cases():
        if only not in case[0]:
            continue
        problem = Problem(case)
        for dtype, (value_bar, gradient_bar) in BARS.items():
            problem.round(dtype, cpu)
            for name, where, call, context, reason in rows(problem, over):
                if call is None:
                    print(line.format(case[0], name, dtype, where, "-", "-", reason), flush=True)
                    continue
                try:
                    with context:
                        quick = where == "interpreted" or (where == "cpu" and name in DEFINITIONS)
                        values, gradients = problem.errors(call, QUICK if quick else None)
                except Exception as error:  # a kernel that an upgrade broke is what this looks for
                    failed += 1
                    what = f"FAILED: {type(error).__name__}: {str(error).splitlines()[:1]}"
                    print(line.format(case[0], name, dtype, where, "-", "-", what), flush=True)
                    continue
                sound = values <= value_bar and gradients <= gradient_bar
                failed += not sound
                shown = f"{values:.1e}", f"{gradients:.1e}"
                verdict = "ok" if sound else f"OVER ITS BAR of {value_bar}, {gradient_bar}"
                print(line.format(case[0], name, dtype, where, *shown, verdict), flush=True)
    print(f"{failed} over their bar; {time.monotonic() - begin:.0f} s")
    return failed


def errors_of(pairs: Iterator[tuple[Any, Any]]) -> float:
    """The largest max|a - b| / max|b| of all arrays; gradients that are zero but for rounding, and
    other arrays below a thousandth of a tree's largest, are compared with that."""
    worst = 0.0
    for pair in pairs:
        actual, desired = ([np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in pair)
        sizes = [np.abs(b).max(initial=0) for b in desired]
        least = max(sizes, default=0) / 1000 or 1
        for a, b, size in zip(actual, desired, sizes, strict=True):
            error = np.abs(a - b).max(initial=0) / max(size, least)
            worst = max(worst, error if np.isfinite(error) else np.inf)
    return float(worst)


def mixer(name: str) -> int:
    """Print whether a mixer obeys the laws of all; how many it does not."""
    build, width = MIXERS.get(name) or imported(name), 64
    trial = laws.Trial(build, width)
    over = {8: "data=2,seq=2,tensor=2", 4: "seq=2,tensor=2", 2: "seq=2"}
    devices = max((n for n in over if n <= len(jax.devices())), default=0)
    every: dict[str, Callable[[], laws.Pairs]] = {
        law: functools.partial(run, trial) for law, run in laws.LAWS.items()
    }
    low = laws.Trial(build, width, jnp.bfloat16)
    every["state is a carry, bfloat16"] = lambda: laws.state_is_a_carry(low)
    if devices:
        made = mesh.make(over[devices])
        every["devices change nothing"] = lambda: laws.devices_change_nothing(trial, made)
    line = "{:26} {:>9}  {}"
    print(line.format(f"{name}, width {width}", "error", ""))
    failed = 0
    for law, run in every.items():
        error = errors_of(run())
        failed += not error <= laws.BAR
        verdict = "ok" if error <= laws.BAR else f"OVER ITS BAR of {laws.BAR}"
        print(line.format(law, f"{error:.1e}", verdict), flush=True)
    if not devices:
        advice = "needs 2, 4 or 8 devices: JAX_NUM_CPU_DEVICES=8 makes them of a CPU"
        print(line.format("devices change nothing", "-", advice))
    config = LMConfig(width=width, depth=1, pattern=name)
    try:
        model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
        specs(config, split(model)[1])
        print(line.format("parameters have places", "-", "ok"))
    except ValueError as error:
        failed += 1
        print(line.format("parameters have places", "-", f"FAILED: {error}"))
    print(f"{failed} failed")
    return failed


def main(args: list[str] | None = None) -> int:
    """0: all within their bars. 1: not. 2: something given is wrong."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        "selftest", description=about, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--mixer", default="", help="a mixer's laws instead: its name in a pattern")
    try:
        given, unknown = parser.parse_known_args(args)
        if unknown:
            raise ValueError(f"{' '.join(unknown)}: there are only --only NAME and --mixer NAME")
        if given.only and given.mixer:
            raise ValueError("--only chooses operations, and --mixer is no operation: give one")
        if given.mixer and given.mixer not in MIXERS and ":" not in given.mixer:
            known = ", ".join(MIXERS)
            raise ValueError(f"--mixer {given.mixer}: not one of {known}, nor module:Class")
        if not any(given.only in case[0] for case in cases()):
            names = ", ".join(case[0] for case in cases())
            raise ValueError(f"--only {given.only}: part of none of {names}")
        mesh.found()
        if given.mixer:
            try:
                return int(mixer(given.mixer) > 0)
            except ValueError as error:
                raise ValueError(f"--mixer {given.mixer}: {error}") from None
        return int(run(given.only) > 0)
    except (ValueError, argparse.ArgumentError) as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
