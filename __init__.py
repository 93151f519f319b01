"""Sequence models in JAX: one definition trains in parallel, streams, decodes and shards."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """`scanax.layers` and its like are imported when they are first asked for."""
    if name in ("kernels", "sharding", "layers", "models"):
        return importlib.import_module(f".{name}", __name__)
    if name in ("load_pretrained", "save_pretrained"):
        return getattr(importlib.import_module(".models.pretrained", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
