"""A decoder-only language model: embedding, blocks, norm, head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..kernels import checks
from ..layers.linear import Linear, product
from ..sharding import vocabulary
from .backbone import Backbone, made_from
from .block import stream_dtype
from .config import LMConfig


class LM(Backbone):
    """logits = head(norm(blocks(embedding[tokens]))), next-token logits at every position.

    Raises ValueError for another kind of config, for ids that are not (B, T) signed integers, a
    reset of another shape, and a state of another model or batch.
    """

    config: LMConfig

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        made_from(config, LMConfig, rngs)
        dtype = jnp.dtype(config.param_dtype)
        rows = -(-config.vocab // config.vocab_multiple) * config.vocab_multiple
        init = jax.nn.initializers.normal(config.init_std)
        self.embedding = nnx.Param(init(rngs.params(), (rows, config.width), dtype))
        super().__init__(config, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tie_head:
            self.head = Linear(
                config.width,
                rows,
                use_bias=False,
                dtype=jnp.dtype(config.dtype),
                param_dtype=dtype,
                kernel_init=init,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: tuple | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T vocab"], tuple]:
        """Logits in at least float32, and the state after the last token."""
        x, state, _ = self.hidden(tokens, state, reset)
        return self.logits(x), state

    def nll(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        *,
        state: tuple | None = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T"], tuple, dict[str, Array]]:
        """-log p(target) in nats at every position, the state, and the blocks' auxiliary values.

        Logits of at most `config.loss_chunk` tokens exist at once, forward or backward: of whole
        time steps, so of one step at least, however large the batch.
        """
        config = self.config
        ids("targets", targets, config.vocab)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets has shape {targets.shape}, tokens {tokens.shape}")
        x, state, aux = self.hidden(tokens, state, reset, key)
        nll = vocabulary.nll(_logits, self.weight, x, targets, config.vocab, config.loss_chunk)
        return nll, state, aux

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        state: tuple | None = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple, dict[str, Array]]:
        """The residual stream after the last norm, the state, and the blocks' auxiliary values."""
        config, stream = self.config, stream_dtype(self.config)
        ids("tokens", tokens, config.vocab)
        known = jnp.where(tokens < config.vocab, tokens, -1)  # others read nan
        x = vocabulary.take(self.embedding[...], known).astype(stream)
        if config.embed_scale:
            x = x * jnp.asarray(config.width**0.5, stream)
        return self.mix(x, state, reset, key)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """The head, accumulated and returned in at least float32."""
        return _logits(x, self.weight)[..., : self.config.vocab]

    @property
    def weight(self) -> Float[Array, "D columns"]:
        """The head's column of each token."""
        return self.embedding[...].T if self.head is None else self.head.kernel[...]


def ids(name: str, x: Any, vocab: int) -> None:
    """Raise a ValueError unless x is (B, T) of a type that holds -1 and the vocabulary."""
    checks.axes(name, x, "B T")
    if not jnp.issubdtype(x.dtype, jnp.signedinteger) or jnp.iinfo(x.dtype).max < vocab:
        raise ValueError(f"{name} is {x.dtype}; ids of a vocabulary of {vocab} must be int32")


def _logits(x, weight):
    exact = jnp.promote_types(jnp.float32, x.dtype)
    dimensions = ((x.ndim - 1,), (0,)), ((), ())
    kinds = {"precision": "highest", "preferred_element_type": exact}
    return product(x, weight.astype(x.dtype), dimensions, **kinds)
