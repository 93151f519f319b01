"""Other libraries' kernels for the operations that `benchmark` times, on the same inputs.

fla: flash-linear-attention 0.6, Triton kernels in PyTorch on CUDA. jla: jax-linear-attention 0.1.0,
Mosaic GPU kernels on Hopper GPUs, plain JAX elsewhere. Neither is needed otherwise.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from . import timing
from .problems import retention

T = TypeVar("T")

INSTALL = {
    "fla": "python -m pip install 'flash-linear-attention[cuda]==0.6.*'",
    "jla": "python -m pip install jax-linear-attention==0.1.0",  # brings the JAX that it is for
}


class Peer(NamedTuple):
    """One operation of another library, ready to be timed."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    output: Callable[[], np.ndarray]
    """y, in float32."""
    implementation: str
    temporaries: int | None
    """Bytes of both passes, of a peer in JAX."""


class Absent(Exception):
    """Why a peer does not run here, and what would change that, in one line."""


def prepare(name: str, op: str, arguments: tuple) -> Peer:
    """A peer's operation on these inputs, each pass having run once. Absent if it cannot."""
    peers = {"fla": _fla, "jla": _jla}
    try:
        peer = peers[name](op, arguments)
        peer.wait(peer.forward())
        peer.wait(peer.both())
        return peer
    except Absent:
        raise
    except ImportError as error:
        raise Absent(f"it is not installed ({_line(error)}): {INSTALL[name]}") from None
    except Exception as error:  # another library's, of any kind
        raise Absent(f"it does not run here: {type(error).__name__}: {_line(error)}") from None


def _known(table: dict[str, T], op: str) -> T:
    if op not in table:
        raise Absent(f"it is compared in {', '.join(table)} only")
    return table[op]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _fla(op: str, arguments: tuple) -> Peer:
    functions = {
        "gla": ("gla", "chunk_gla", ("q", "k", "v", "g", "initial_state")),
        "mamba2": ("simple_gla", "chunk_simple_gla", ("q", "k", "v", "g", "initial_state")),
        "retention": ("retention", "chunk_retention", ("q", "k", "v", "initial_state")),
    }
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Absent(f"it needs an NVIDIA GPU and PyTorch for CUDA: {INSTALL['fla']}")
    module, function, names = _known(functions, op)
    run = getattr(importlib.import_module(f"fla.ops.{module}"), function)

    def moved(x):
        dtype = getattr(torch, x.dtype.name)
        return torch.tensor(np.asarray(x, np.float32), device="cuda").to(dtype).requires_grad_()

    inputs = {name: moved(x) for name, x in zip(names, arguments, strict=True)}

    def call():
        return run(**inputs, scale=1.0, output_final_state=True)

    def forward():
        with torch.no_grad():
            return call()

    def both():
        outputs = call()
        cotangents = [x.detach() for x in outputs]
        return outputs, torch.autograd.grad(outputs, list(inputs.values()), cotangents)

    def output():
        return forward()[0].float().cpu().numpy()

    return Peer(forward, both, lambda _: torch.cuda.synchronize(), output, "triton", None)


def _jla(op: str, arguments: tuple) -> Peer:
    def linear(q, k, v, *rest):
        *log, state = rest
        if op == "retention":
            log = [jnp.broadcast_to(retention(q.shape[2]), q.shape[:3])]
        kind = "gla" if op == "gla" else "simple_gla"
        how = {"scale": 1.0, "initial_state": state, "output_final_state": True}
        return ops.linear_attention(kind, q, k, v, g=log[0], **how)

    def selective(u, delta, A, B, C):
        return ops.linear_attention("mamba1", C, B, u, dt=delta, a=A, output_final_state=True)

    runs = {"gla": linear, "mamba2": linear, "retention": linear, "mamba": selective}
    ops: Any = importlib.import_module("jla.ops")
    run = _known(runs, op)
    forward, both = (timing.compiled(f, arguments) for f in (run, timing.both(run)))

    def output():
        return np.asarray(forward(*arguments)[0], np.float32)

    return Peer(
        lambda: forward(*arguments),
        lambda: both(*arguments),
        jax.block_until_ready,
        output,
        "mosaic_gpu" if "mosaic_gpu" in forward.as_text() else "xla",
        both.memory_analysis().temp_size_in_bytes,
    )
