"""The selective scan for Hopper GPUs: a thread a channel, its states in registers.

The equations are those of `xla.py`. There is no product of matrices to be made (the decay is
another for each channel and state), so tokens go one after another, as in `pallas_tpu.py`: what
limits the kernels is the exponentials, N a token and channel forward and 2 N backward, 16 a clock.

Bytes a token and channel, with delta in float32 as Mamba has it: forward u, delta and y, 8, the
least there is; B and C are read again for each 128 channels, N / 32. When differentiated a state is
kept for every 16 tokens, N / 4 bytes. Backward u, delta, dy and two gradients, 14; the kept
states, N / 4; B and C, N / 32, and their gradients, N / 16, written for each 128 channels and then
summed.
"""

import jax
import jax.numpy as jnp

from .. import keep, pallas
from ..dispatch import late

CHANNELS = 128
CHUNK = {16: 16, 32: 8}  # tokens, all of whose states the backward has in shared memory
LOG2E = 1.4426950408889634

forward = late(f"{__package__}.pallas_gpu_kernels", "forward")
backward = late(f"{__package__}.pallas_gpu_kernels", "backward")


def refuse(u, delta, A, B, C, D, state, reset, chunk):
    """Why not, or None."""
    del D, state, reset
    if reason := pallas.no_hopper(u, B, C):
        return reason
    if reason := pallas.wrong_dtype([delta], (jnp.float32, jnp.bfloat16)):
        return f"of delta {reason}"
    states = A.shape[1]
    if states > max(CHUNK):
        return f"its states are up to N={max(CHUNK)} numbers a channel, not {states}"
    size = CHUNK[_up(states, 16)]
    if chunk not in (None, size):
        return f"its chunks are of {size} tokens for N={states}, not {chunk}"
    return None


def selective_scan(u, delta, A, B, C, D, state, reset, chunk):
    """The public function's arguments after its checks."""
    del chunk
    (batch, time, width), N = u.shape, A.shape[1]
    states, channels = _up(N, 16), _up(width, CHANNELS)
    size = CHUNK[states]
    tokens = _up(time, size)

    def pad(x, *to):
        return jnp.pad(x, [(0, n - have) for n, have in zip(to, x.shape, strict=True)])

    begins = None
    if reset is not None:
        begins = pad(reset.astype(jnp.int32), batch, tokens).reshape(batch, -1, size)
        begins = pad(begins, *begins.shape[:2], 32)  # copies are of 128 bytes
    y, state = _scan(
        pallas.target(),
        size,
        pad(u, batch, tokens, channels),
        pad(delta, batch, tokens, channels),
        pad(A, channels, states),
        pad(B, batch, tokens, states),
        pad(C, batch, tokens, states),
        pad(D, channels),
        pad(state, batch, channels, states),
        begins,
    )
    return y[:, :time, :width], state[:, :width, :N]


def _up(n, multiple):
    return n + -n % multiple


def _forward(device, size, u, delta, A, B, C, D, state, begins):
    inputs = u, delta, A * LOG2E, B, C, D
    y, final, starts = forward(device, size, *inputs, state, begins, keep=True)
    return (y, final), (*inputs, starts, begins)


def _backward(device, size, residuals, cotangents):
    *inputs, starts, begins = residuals
    u, B = inputs[0], inputs[3]
    gradients = backward(device, size, *inputs, starts, *cotangents, begins)
    du, d_delta, dA, dB, dC, dD, d_state = gradients
    dB, dC = (d.sum(axis=1).astype(u.dtype).reshape(B.shape) for d in (dB, dC))
    return du, d_delta, dA.sum(axis=0), dB, dC, dD.sum(axis=0), d_state, None


def _values(device, size, u, delta, A, B, C, D, state, begins):
    return tuple(forward(device, size, u, delta, A * LOG2E, B, C, D, state, begins, keep=False))


_scan = jax.custom_vjp(_values, nondiff_argnums=(0, 1))
_scan.defvjp(keep.rule(_forward), _backward)
