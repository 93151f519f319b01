"""Operations of sequence models: arrays in, arrays out; no parameters, no config, no meshes.

Letters, here and in every file of this folder:
    B batch    T time    S source time    H heads    G groups of heads (each G divides H)
    K key      V value   D width          N state    E experts    C chunk    c sub-chunk
    P channels of a complex state, S in `diagonal_scan` its payload's axes (height and width)
    M rows, in groups of one expert each; K and N are then the features in and out

Read `monoid` first: every operation that mixes a sequence is one monoid, and an implementation is a
schedule of it. `grouped_matmul` mixes nothing: every row goes alone.
"""

from .attention import attention, fixed_query
from .diagonal_scan import diagonal_scan
from .grouped_matmul import grouped_matmul
from .linear_attention import linear_attention
from .prefixes import prefixes
from .selective_scan import selective_scan

__all__ = [
    "attention",
    "diagonal_scan",
    "fixed_query",
    "grouped_matmul",
    "linear_attention",
    "prefixes",
    "selective_scan",
]
