"""Which implementation of an operation runs where, and which one ran.

`implementation=None` takes the first of the operation's list that accepts the call; a name gets
that implementation or a NotImplementedError that says why not. Nothing falls back silently.

What an implementation accepts depends on the arguments and on the target: the device that the call
is traced for. That is JAX's first device, unless `on` names another, to lower for hardware that is
not there or to run a Pallas kernel through an interpreter.
"""

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

_ran: contextvars.ContextVar[tuple[list[tuple[str, str]], ...]] = contextvars.ContextVar(
    "scanax_ran", default=()
)


_target: contextvars.ContextVar["Target | None"] = contextvars.ContextVar(
    "scanax_target", default=None
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that calls are traced for."""

    platform: str
    """cpu, gpu or tpu."""
    kind: str
    """The model, as JAX names it: "TPU v5 lite", "NVIDIA H200"."""
    capability: str = ""
    """Of an NVIDIA GPU, its compute capability: "9.0"."""
    interpret: Any = False
    """Pallas kernels run on this machine's CPU: True, or an interpreter's parameters."""


def target() -> Target:
    """The one that `on` names, or JAX's default device, or its first."""
    named = _target.get()
    if named is not None:
        return named
    device: Any = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    capability = getattr(device, "compute_capability", "")
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform, device.device_kind, str(capability))


@contextlib.contextmanager
def on(device: Target) -> Iterator[None]:
    """Trace the calls inside the block for `device`, whatever this machine has.

    A function that `jax.jit` has already traced keeps the target it was traced for.
    """
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def late(module: str, function: str) -> Callable[..., Any]:
    """A module's function, imported at its first call: Pallas is slow to load and may be broken."""

    def run(*args, **kwargs):
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return run


def _accepts(*args: Any, **kwargs: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`run` computes; `refuse`, given the same arguments, returns None or why it will not."""

    run: Callable[..., Any]
    refuse: Callable[..., str | None] = _accepts


def call(
    op: str,
    implementations: dict[str, Implementation],
    name: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `op` by the named implementation, or by the first that accepts these arguments.

    Raises NotImplementedError, with the reasons, if none does, or the one that is named does not.
    """
    if name is not None and name not in implementations:
        raise NotImplementedError(
            f"{op} has no implementation {name!r}; it has {', '.join(implementations)}"
        )
    reasons = []
    for candidate in [name] if name is not None else list(implementations):
        reason = implementations[candidate].refuse(*args, **kwargs)
        if reason is None:
            for record in _ran.get():
                record.append((op, candidate))
            return implementations[candidate].run(*args, **kwargs)
        reasons.append(f"{candidate}: {reason}")
    raise NotImplementedError(f"no implementation of {op} takes this call: " + "; ".join(reasons))


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Collect (operation, implementation) of every call that is traced inside the block.

    A function that `jax.jit` has already compiled is not traced again and so is not listed.
    """
    ran: list[tuple[str, str]] = []
    token = _ran.set((*_ran.get(), ran))
    try:
        yield ran
    finally:
        _ran.reset(token)
