"""Other libraries' kernels for the operations that `benchmark` times, on the same inputs.

fla: flash-linear-attention 0.6, Triton kernels in PyTorch on CUDA. jla: jax-linear-attention 0.1.0,
Mosaic GPU kernels on Hopper GPUs, plain JAX elsewhere. Neither is needed otherwise.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from .prepared import Prepared, prepared
from .problems import retention

T = TypeVar("T")

INSTALL = {
    "fla": "python -m pip install 'flash-linear-attention[cuda]==0.6.*'",
    # it is for Python 3.12 and jax 0.11.2, which it would install in the place of any other
    "jla": "python -m pip install --no-deps jax-linear-attention==0.1.0 equinox",
    "transformers": "python -m pip install 'scanax[bench]'",
    "torchscale": "python -m pip install --no-deps torchscale==0.3.0 fairscale==0.4.0 timm==0.6.13",
}
OPERATIONS = {
    "fla": ("gla", "mamba2", "retention"),
    "jla": ("gla", "mamba2", "retention", "mamba"),
}


class Absent(Exception):
    """Why a peer does not run here, and what would change that, in one line."""


def prepare(name: str, op: str, arguments: tuple) -> Prepared:
    """A peer's operation on these inputs, each pass having run once. Absent if it cannot."""
    return attempted(functools.partial({"fla": _fla, "jla": _jla}[name], op, arguments), name)


def attempted(make: Callable[[], T], name: str) -> T:
    """What another library makes. Absent if it cannot."""
    try:
        return make()
    except Absent:
        raise
    except ImportError as error:
        raise Absent(f"it is not installed ({_line(error)}): {INSTALL[name]}") from None
    except Exception as error:  # another library's, of any kind
        raise Absent(f"it does not run here: {type(error).__name__}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _fla(op: str, arguments: tuple) -> Prepared:
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Absent(f"it needs an NVIDIA GPU and PyTorch for CUDA: {INSTALL['fla']}")
    module, function, names = {
        "gla": ("gla", "chunk_gla", ("q", "k", "v", "g", "initial_state")),
        "mamba2": ("simple_gla", "chunk_simple_gla", ("q", "k", "v", "g", "initial_state")),
        "retention": ("retention", "chunk_retention", ("q", "k", "v", "initial_state")),
    }[op]
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

    def wait(_):
        torch.cuda.synchronize()

    y = forward()[0].float().cpu().numpy()
    wait(both())
    return Prepared(forward, both, wait, y, {"implementation": "triton"})


def _jla(op: str, arguments: tuple) -> Prepared:
    ops: Any = importlib.import_module("jla.ops")

    def linear(q, k, v, *rest):
        *log, state = rest
        if op == "retention":
            log = [jnp.broadcast_to(retention(q.shape[2]), q.shape[:3])]
        kind = "gla" if op == "gla" else "simple_gla"
        how = {"scale": 1.0, "initial_state": state, "output_final_state": True}
        return ops.linear_attention(kind, q, k, v, g=log[0], **how)

    def selective(u, delta, A, B, C):
        return ops.linear_attention("mamba1", C, B, u, dt=delta, a=A, output_final_state=True)

    found = prepared(selective if op == "mamba" else linear, arguments)
    kernel = "mosaic_gpu" if "mosaic_gpu" in found.forward.func.as_text() else "xla"
    return found._replace(about=found.about | {"implementation": kernel})
