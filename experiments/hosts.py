"""Many processes as one run: how they start, agree and end. With one process nothing here waits.

They talk through the service that process 0 runs for `jax.distributed`: a few bytes at a time, from
any thread, while the devices compute.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from jax._src.distributed import global_state  # its client has no public name

from .launcher import Hosts, arguments

LONG = 24 * 3600 * 1000  # ms; that a process is gone is noticed by its silence, far earlier


def start(hosts: Hosts) -> None:
    """Join the other processes, if there are any; ValueError if they do not come in time."""
    given = None if global_state.client else arguments(hosts, os.environ)
    if given is None:
        return
    if given.get("process_id") == 0:
        free(given["coordinator_address"])
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    shown = os.dup(2)
    to = given.get("coordinator_address", "their coordinator")
    late = f"the processes did not all come to {to} in hosts.timeout={hosts.timeout} seconds"
    _on_abort(f"train: {late}", 2, shown)
    with open(os.devnull, "w") as nowhere:  # what C++ says of that takes a page
        os.dup2(nowhere.fileno(), 2)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=hosts.timeout,
            heartbeat_timeout_seconds=hosts.silence,
        )
    except Exception as error:  # a port in use, a variable that is missing, no metadata server
        reason = f"{error or type(error).__name__}".splitlines()[0]
        raise ValueError(f"jax.distributed did not start: {reason}") from None
    finally:
        os.dup2(shown, 2)
        os.close(shown)
    if several():
        gone = "another process ended or is not heard of; --resume goes on from the last checkpoint"
        _on_abort(f"{who()}: {gone}", 1)
        threading.Thread(target=_told, daemon=True).start()


def free(address: str) -> None:
    """ValueError if the port is in use; JAX's service ends there with a segmentation fault."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"hosts.coordinator={address!r}: {error}") from None


def several() -> bool:
    return global_state.num_processes > 1


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return global_state.process_id == 0


def who() -> str:
    """How this process's lines begin."""
    if not several():
        return "train"
    return f"train: process {global_state.process_id} of {global_state.num_processes}"


def _client() -> Any:
    return global_state.client


def cut_off(reason: str) -> str:
    """What to say of an error of a computation that other processes may have a part in."""
    return f"a computation failed, as it does when another process ends: {reason.splitlines()[0]}"


_turns: dict[str, int] = {}


def gather(name: str, value: Any) -> list[Any]:
    """Every process's value (JSON), by index. All call it for a name equally often, or wait."""
    if not several():
        return [value]
    client = _client()
    turn = _turns[name] = _turns.get(name, -1) + 1
    here = f"scanax/{name}/{turn}"
    if not first():
        client.key_value_set(f"{here}/{global_state.process_id}", json.dumps(value))
        return json.loads(client.blocking_key_value_get(f"{here}/all", LONG))
    others = range(1, global_state.num_processes)
    values = [json.loads(client.blocking_key_value_get(f"{here}/{i}", LONG)) for i in others]
    client.key_value_set(f"{here}/all", json.dumps([value, *values]))
    if turn:  # who came to this one has read the one before
        client.key_value_delete(f"scanax/{name}/{turn - 1}/")
    return [value, *values]


def share(folder: Path) -> None:
    """Make the run's folder; nobody writes to it before all are here. ValueError if not all see it:
    a checkpoint would hold a part of the arrays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = gather("here", secrets.token_hex(8))[0]
    if not several():
        return
    mark = folder / "config.json.new"  # as a run leaves it that is killed early
    if first():
        mark.write_text(token)
    gather("mark", None)
    seen = gather("seen", mark.is_file() and mark.read_text() == token)
    if not all(seen):
        other = f"{folder} is another folder for process {seen.index(False)}"
        raise ValueError(f"{other}; it must be on a disk that all processes see")


_ending = threading.Lock()


def leave(error: BaseException, code: int) -> int:
    """Say why this process ends, and end the others with it; the exit code."""
    reason = str(error) or type(error).__name__
    if isinstance(error, jax.errors.JaxRuntimeError):
        reason = cut_off(reason)
    if several() and not _ending.acquire(blocking=False):
        threading.Event().wait()  # it is being ended by what another one said
    print(f"{who()}: {reason}", file=sys.stderr)
    global _code
    _code = code  # an abort from here on has nothing to add
    if several():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            said = json.dumps([code, f"process {global_state.process_id} ended: {reason}"])
            _client().key_value_set("scanax/end", said)
        _exit(code)
    return code


def finish() -> None:
    """End together, all done."""
    if several() and _ending.acquire(blocking=False):
        try:
            gather("finish", None)
            jax.distributed.shutdown()
        except BaseException:
            _ending.release()  # there is something to say after all
            raise


def _told() -> None:
    """End this process when another one says that it ends."""
    said = None
    while said is None:
        try:
            said = _client().blocking_key_value_get("scanax/end", LONG)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # the run's end, or process 0's, which aborts
                return
    code, why = json.loads(said)
    if _ending.acquire(blocking=False):
        print(f"{who()}: {why}", file=sys.stderr)
        _exit(code)


def _exit(code: int) -> None:
    """Without the exit handlers, which would wait for the dead; all have heard of it, or 5 s."""
    global _code
    _code = code
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier("scanax/end", 5000)
    os._exit(code)


_code: int | None = None
_handler: Any = None


def _on_abort(line: str, code: int, stderr: int = 2) -> None:
    """JAX's service aborts a process that lost the others: with this line and exit code instead."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:  # C++ stops in abort(), which Python's signal module cannot hear
        if _code is None:
            os.write(stderr, f"{line}\n".encode())
        os._exit(code if _code is None else _code)

    global _handler
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    _handler = handler  # C holds no reference
