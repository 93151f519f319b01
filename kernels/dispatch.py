"""Which implementation of an operation runs where, and which one ran.

`implementation=None` takes the first of the operation's list that accepts the call; a name gets
that implementation or a NotImplementedError that says why not. Nothing falls back silently.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

_ran: contextvars.ContextVar[tuple[list[tuple[str, str]], ...]] = contextvars.ContextVar(
    "scanax_ran", default=()
)


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
    """Run `op` by the named implementation, or by the first that accepts these arguments."""
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
