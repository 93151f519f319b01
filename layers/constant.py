"""Arrays that belong to a layer but are not trained."""

from flax import nnx


class Constant(nnx.Variable):
    """A per-layer array set once, such as a decay by depth or rotary frequencies.

    Being a variable, it is stacked with its block's others; not being a Param, no optimiser sees
    it.
    """
