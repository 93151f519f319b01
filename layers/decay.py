"""Constant decays by head and depth: log decays in nats per token, as float64 NumPy arrays."""

import numpy as np


def retention(heads: int) -> np.ndarray:
    """log(1 - 2^(-5 - h)), h = 0 .. H - 1  (RetNet, arXiv:2307.08621)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))


def vir(heads: int) -> np.ndarray:
    """log(1 - f_h), f from 1/32 to 1/512 evenly in its logarithm: the authors' code for ViR (and an
    early RetNet), where the paper has that of `retention`  (arXiv:2310.19731)."""
    return np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads)))


def alibi_slopes(heads: int) -> np.ndarray:
    """2^(-8 (h + 1) / H); if H is no power of two, those of the power below and then every second
    of the power above  (arXiv:2108.12409)."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power == heads:
        return slopes
    return np.concatenate([slopes, alibi_slopes(2 * power)[::2][: heads - power]])


def lightning(schedule: str, heads: int, layer: int, layers: int) -> np.ndarray:
    """Each head's log decay in one layer of TransNormerLLM; four schedules go by that name.

    "released" is the authors' code, "paper" their formula (heads and layers counted from 1, so that
    the last layer forgets nothing), "fla" flash-linear-attention's (counted from 0), "minimax"
    MiniMax's, which differs from "released" by 1e-5 and where H is not a power of two.
    """
    head = np.arange(heads)
    match schedule:
        case "released":
            return -alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)
        case "paper":
            return -8 / heads * (head + 1) * (1 - (layer + 1) / layers)
        case "fla":
            return -8 / heads * head * (1 - layer / layers)
        case "minimax":
            return -(2.0 ** (-8 / heads * (head + 1))) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    raise ValueError(f"decay={schedule!r}; it is one of 'released', 'paper', 'fla' and 'minimax'")
