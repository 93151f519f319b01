"""Nats of every token of a text, by how much of its document was read before."""

import math
from collections.abc import Callable

import jax
import numpy as np
import tqdm
from flax import nnx
from jax.sharding import Mesh, use_abstract_mesh

from ..models import LM
from ..sharding import mesh
from .datasets import text as texts

Score = Callable[[texts.Batch], np.ndarray]
READ = ("tokens", "targets", "reset")


def scorer(model: LM, over: Mesh) -> Score:
    """Nats of every target of a batch, whose rows and time lie over the mesh."""
    graphdef, variables = nnx.split(model)
    parts = math.prod(over.shape[axis] for axis in mesh.ROWS)

    @jax.jit
    def nll(variables, tokens, targets, reset):
        with use_abstract_mesh(over.abstract_mesh):
            return nnx.merge(graphdef, variables).nll(tokens, targets, reset=reset)[0]

    def score(batch):
        rows, length = batch["tokens"].shape
        more = -rows % parts  # rows of nothing, so that they divide
        place = mesh.sharding(over, mesh.ROWS, None if length == 1 else "seq")
        arrays = (np.pad(batch[name], ((0, more), (0, 0))) for name in READ)
        found = nll(variables, *jax.device_put(tuple(arrays), place))
        return np.asarray(found, np.float64)[:rows]

    return score


def measure(score: Score, source: texts.Source, rows: int, length: int, tokens: int) -> dict:
    """Means over rows of `length` tokens that start fresh, and by how many tokens are read before.

    About `tokens` of them, in batches spread over the text; 0: all.
    """
    available = texts.evaluation_steps(source, batch=rows, length=length)
    count = min(-(-tokens // (rows * length)) or available, available)
    # bucket 0 has targets after 1 token, bucket b those after more than 2^(b-1), up to 2^b
    total, weight = np.zeros((2, length.bit_length() + 1))
    for i in tqdm.tqdm(range(count), desc=f"length {length}", leave=False, disable=None):
        batch = texts.evaluation(source, i * available // count, batch=rows, length=length)
        nll, counted = score(batch), batch["weights"] > 0
        place = np.arange(length)
        place = place - np.maximum.accumulate(np.where(batch["reset"], place, 0), axis=1)
        bucket = np.frexp(place)[1][counted]
        total += np.bincount(bucket, nll[counted], total.size)
        weight += np.bincount(bucket, minlength=total.size)
    if not weight.sum():
        raise ValueError(f"{source.name}: no document has 2 tokens, so there is nothing to predict")
    mean = float(total.sum() / weight.sum())
    result = {"length": length, "nats_per_token": mean, "perplexity": float(np.exp(mean))}
    if source.bytes_per_token:
        result["bits_per_byte"] = mean / math.log(2) / source.bytes_per_token
    curve = [
        {
            "from": 2**b // 2 + 1,
            "to": min(2**b, length),
            "nats_per_token": total[b] / weight[b],
            "tokens": int(weight[b]),
        }
        for b in np.flatnonzero(weight).tolist()
    ]
    return result | {"tokens": int(weight.sum()), "by_context": curve}
