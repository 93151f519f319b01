"""A decoder-only language model: embedding, blocks, norm, head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..layers.linear import Linear, flat_dot_general
from ..sharding import mesh, vocabulary
from .block import abstract, norm, runs, stack
from .config import LMConfig

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class LM(nnx.Module):
    """logits = head(norm(blocks(embedding[tokens]))), next-token logits at every position.

    A state is a tuple with one entry a block, the mixer's own (None for attention that keeps no
    cache), whatever blocks are scanned together; batch is the leading axis of its leaves. A model
    without a state starts fresh; `reset` marks the tokens before which everything is forgotten.
    Nothing random happens inside yet, so no call takes a key.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.param_dtype)
        rows = -(-config.vocab // config.vocab_multiple) * config.vocab_multiple
        init = jax.nn.initializers.normal(config.init_std)
        self.embedding = nnx.Param(init(rngs.params(), (rows, config.width), dtype))
        self.blocks = nnx.List([stack(config, run, rngs.params()) for run in runs(config)])
        self.norm = norm(config, rngs)
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
    ) -> tuple[Float[Array, "B T"], tuple, dict[str, Array]]:
        """-log p(target) in nats at every position, the state, and the blocks' auxiliary values.

        Logits of at most `config.loss_chunk` tokens exist at once, forward or backward: of whole
        time steps, so of one step at least, however large the batch.
        """
        x, state, aux = self.hidden(tokens, state, reset)
        config = self.config
        nll = vocabulary.nll(_logits, self.weight, x, targets, config.vocab, config.loss_chunk)
        return nll, state, aux

    def init_state(self, batch: int, max_length: int) -> tuple:
        """The state before any token; caches have room for `max_length` tokens."""
        dtype, states = jnp.dtype(self.config.dtype), []
        for run in runs(self.config):
            # a mixer may read its variables' shapes, which are those of one layer here
            block = nnx.merge(*abstract(self.config, run.kind, run.start))
            states += [block.mixer.init_state(batch, max_length, dtype) for _ in range(run.length)]
        return tuple(states)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        state: tuple | None = None,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple, dict[str, Array]]:
        """The residual stream after the last norm, the state, and the blocks' auxiliary values."""
        config = self.config
        if state is not None and len(state) != config.depth:
            raise ValueError(f"state has {len(state)} entries; the model has {config.depth} blocks")
        if state is not None and any(entry is None for entry in state):
            raise ValueError(
                "state is of a call without one, where attention keeps no cache; "
                "begin with init_state"
            )
        dtype = jnp.dtype(config.dtype)
        stream = jnp.promote_types(jnp.float32, dtype) if config.residual_float32 else dtype
        known = jnp.where(tokens < config.vocab, tokens, -1)  # others read nan
        x = vocabulary.take(self.embedding[...], known).astype(stream)
        if config.embed_scale:
            x = x * jnp.asarray(config.width**0.5, stream)
        x = mesh.constrain(x, mesh.ROWS, mesh.over_time(x.shape[1]))
        states, aux = [], []
        for run, stacked in zip(runs(config), self.blocks, strict=True):
            given = None if state is None else state[run.start : run.start + run.length]
            x, after, extra = self._run(stacked, run.length, x, given, reset)
            states += after
            aux.append(extra)
        return self.norm(x), tuple(states), _join(aux)

    def _run(self, stacked, length: int, x: Array, state: tuple | None, reset: Array | None):
        """Scan over the layers of one run; returns a list of states, one a layer."""
        graphdef, variables = nnx.split(stacked)

        def body(x, layer):
            variables, state = layer
            x, state, aux = nnx.merge(graphdef, variables)(x, state, reset)
            return mesh.constrain(x, mesh.ROWS, mesh.over_time(x.shape[1])), (state, aux)

        if self.config.remat != "none":
            # the scan already keeps the recomputation from being merged with the first one
            body = jax.checkpoint(body, policy=POLICIES[self.config.remat], prevent_cse=length == 1)
        if length == 1:
            layer = jax.tree.map(lambda p: p[0], variables), None if state is None else state[0]
            x, (after, aux) = body(x, layer)
            return x, [after], jax.tree.map(lambda a: a[None], aux)
        if state is not None:
            state = jax.tree.map(lambda *s: jnp.stack(s), *state)
        x, (after, aux) = jax.lax.scan(body, x, (variables, state))
        return x, [jax.tree.map(lambda s, i=i: s[i], after) for i in range(length)], aux

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """The head, accumulated and returned in at least float32."""
        return _logits(x, self.weight)[..., : self.config.vocab]

    @property
    def weight(self) -> Float[Array, "D columns"]:
        """The head's column of each token."""
        return self.embedding[...].T if self.head is None else self.head.kernel[...]


def _logits(x, weight):
    exact = jnp.promote_types(jnp.float32, x.dtype)
    dimensions = ((x.ndim - 1,), (0,)), ((), ())
    kinds = {"precision": "highest", "preferred_element_type": exact}
    return flat_dot_general(x, weight.astype(x.dtype), dimensions, **kinds)


def _join(aux: list[dict[str, Array]]) -> dict[str, Array]:
    """Auxiliary values of all runs, one entry a layer that has them."""
    names = dict.fromkeys(name for each in aux for name in each)
    return {name: jnp.concatenate([a[name] for a in aux if name in a]) for name in names}
