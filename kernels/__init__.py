"""Sequence-mixing operations: arrays in, arrays out; no parameters, no config, no meshes.

Letters, here and in every file of this folder:
    B batch    T time    S source time    H heads    G groups of heads (each G divides H)
    K key      V value   D width          N state    E experts    C chunk    c sub-chunk

Read `monoid` first: every operation is one monoid, and an implementation is a schedule of it.
"""

from .attention import attention, fixed_query
from .grouped_matmul import grouped_matmul
from .linear_attention import linear_attention
from .selective_scan import selective_scan

__all__ = ["attention", "fixed_query", "grouped_matmul", "linear_attention", "selective_scan"]
