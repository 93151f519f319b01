"""Generation: prompts in by chunks, then one compiled loop of O(1) steps."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, use_abstract_mesh
from jaxtyping import Array, Float, Int, UInt32

from ..models import LM, merge, split
from ..models.partition import shardings, state_shardings
from ..sharding import mesh

AXES = (*mesh.ROWS, "seq", "tensor")  # of a mesh that a model is read and continued on


class Context(NamedTuple):
    """All that is needed to go on: the model's state, its next logits, and where a draw stands."""

    state: Any
    logits: Float[Array, "B V"]
    keys: UInt32[Array, "B 2"]
    drawn: Int[Array, "B"]  # tokens generated so far


class Choice(NamedTuple):
    """How a token is drawn: at a temperature, from the top k, from the top p of those."""

    temperature: float = 0.8
    """0 takes the likeliest."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the fewest tokens, likeliest first, that together have at least this probability."""


def choose(
    logits: Float[Array, "B V"], keys: UInt32[Array, "B 2"], drawn: Int[Array, "B"], how: Choice
) -> Int[Array, "B"]:
    """One token a row, a pure function of the row's key and the number of its draw.

    Of equal logits the lower token counts as the likelier.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # differences, so that a low temperature makes no infinities
    logits = (logits - logits.max(-1, keepdims=True)) / how.temperature

    def draw(key, number, logits):
        if how.top_k or how.top_p < 1:
            size = min(how.top_k or logits.size, logits.size)
            likeliest, tokens = jax.lax.top_k(logits, size)
            before = jnp.cumsum(jax.nn.softmax(likeliest))[:-1]  # of all that are likelier
            kept = jnp.concatenate([jnp.array([True]), before < how.top_p])
            kept = jnp.zeros(logits.shape, bool).at[tokens].set(kept, unique_indices=True)
            logits = jnp.where(kept, logits, -jnp.inf)
        return jax.random.categorical(jax.random.fold_in(key, number), logits)

    return jax.vmap(draw)(keys, drawn, logits).astype(jnp.int32)


def row_keys(prompts: Sequence[np.ndarray], seed: int) -> UInt32[np.ndarray, "B 2"]:
    """A key a row from the seed and the prompt, so that a row draws what it draws alone.

    Equal prompts are told apart by how many came before.
    """
    seen: dict[bytes, int] = {}
    keys = []
    for prompt in prompts:
        text = np.asarray(prompt, np.int32).tobytes()
        again = seen[text] = seen.get(text, -1) + 1
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(text))
        keys.append(np.asarray(jax.random.key_data(jax.random.fold_in(key, again))))
    return np.stack(keys)


def left_padded(prompts: Sequence[np.ndarray], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """tokens and reset (B, longest): zeros before each prompt, reset on its first token.

    The longest is rounded up to a multiple, by more zeros.
    """
    longest = -(-max(map(len, prompts)) // multiple) * multiple
    tokens = np.zeros((len(prompts), longest), np.int32)
    reset = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        reset[row, longest - len(prompt)] = True
    return tokens, reset


class Generator:
    """The compiled functions of one model. A context that is given to one of them is used up.

    On a mesh (None: the first device) rows lie over `mesh.ROWS`, prompts and attention's
    caches over `seq`, heads over `tensor`. A model whose blocks are stacked is slower to decode,
    on a CPU a few times: the loop copies a layer's weights out of the stack for every token.
    """

    def __init__(self, model: LM, over: Mesh | None = None):
        self.model = model
        self.mesh = over = mesh.only(mesh.make() if over is None else over, *AXES)
        self.span = over.shape["seq"]
        self.graphdef, params, rest = split(model)
        # Everything is put here by name: jit compiles once more for what is only there by default.
        everywhere: Any = mesh.sharding(over)
        rows: Any = mesh.sharding(over, mesh.ROWS)
        places = shardings(model.config, params, over), everywhere
        self.variables = jax.device_put((params, rest), places)
        state = state_shardings(jax.eval_shape(lambda: model.init_state(1, 1)), over)
        self.places = Context(state, rows, rows, rows)
        self.blank = jax.jit(self._blank, static_argnums=(0, 1), out_shardings=state)
        self.feed = jax.jit(self._feed, donate_argnums=1, out_shardings=(rows, state))
        self.loop = jax.jit(
            self._loop,
            static_argnums=(0, 1, 2),
            donate_argnums=4,
            out_shardings=(everywhere, self.places),
        )
        self.each: Callable[[np.ndarray], None] = lambda tokens: None

    def start(
        self, prompts: Sequence[np.ndarray], room: int, seed: int, chunk: int, multiple: int = 1
    ) -> Context:
        """Read prompts of any lengths, with room for `room` tokens a row in attention's caches.

        A row is read and continued as it is alone, to the rounding of other array shapes. Lengths
        are rounded up to a multiple, so that fewer shapes are compiled.
        """
        self.check(len(prompts))
        tokens, reset = left_padded(prompts, math.lcm(self.span, multiple))
        logits, state = self._read(self.blank(len(prompts), room), tokens, reset, chunk)
        drawn = jnp.zeros(len(prompts), jnp.int32)
        return Context(state, logits, jnp.asarray(row_keys(prompts, seed)), drawn)

    def go_on(self, context: Context, tokens: np.ndarray, chunk: int) -> Context:
        """Read more tokens (B, T), at least one a row, after what the context has read."""
        reset = np.zeros(tokens.shape, bool)
        state = jax.device_put(context.state, self.places.state)
        logits, state = self._read(state, np.asarray(tokens, np.int32), reset, chunk)
        return context._replace(state=state, logits=logits)

    def generate(
        self,
        context: Context,
        count: int,
        how: Choice,
        each: Callable[[np.ndarray], None] | None = None,
    ) -> tuple[np.ndarray, Context]:
        """`count` more tokens a row (B, count), and the context after them.

        The whole loop is one compiled call; `each` is called with every step's tokens (B,) while
        it runs.
        """
        if each is not None:
            self.each = each
        context = jax.device_put(context, self.places)
        tokens, context = self.loop(count, how, each is not None, self.variables, context)
        jax.effects_barrier()
        return np.asarray(tokens), context

    def check(self, rows: int) -> None:
        """Raise a ValueError if so many rows do not divide over the devices."""
        with use_abstract_mesh(self.mesh.abstract_mesh):
            mesh.divide("prompts", rows, *mesh.ROWS)

    def _read(self, state, tokens, reset, chunk):
        """By pieces of `chunk` tokens, the first one shorter: at most two compiled shapes.

        On a mesh pieces divide over `seq`, and tokens that are left over are read one by one.
        """
        logits: Any = None
        chunk, begin = -(-chunk // self.span) * self.span, 0
        whole = tokens.shape[1] // self.span * self.span
        while begin < tokens.shape[1]:
            end = begin + ((whole - begin) % chunk or chunk) if begin < whole else begin + 1
            logits, state = self.feed(
                self.variables, state, tokens[:, begin:end], reset[:, begin:end]
            )
            begin = end
        return logits, state

    def _blank(self, rows, room):
        with use_abstract_mesh(self.mesh.abstract_mesh):
            return self.model.init_state(rows, room)

    def _feed(self, variables, state, tokens, reset):
        with use_abstract_mesh(self.mesh.abstract_mesh):
            model: Any = merge(self.graphdef, *variables)
            x, state, _ = model.hidden(tokens, state, reset)
            return model.logits(x[:, -1:])[:, 0], state

    def _loop(self, count, how, streamed, variables, context):
        model = merge(self.graphdef, *variables)

        def step(context, _):
            logits = mesh.constrain(context.logits, mesh.ROWS)
            token = choose(logits, context.keys, context.drawn, how)
            if streamed:
                io_callback(self._show, None, mesh.constrain(token), ordered=True)
            logits, state = model(token[:, None], context.state)
            context = Context(state, logits[:, 0], context.keys, context.drawn + 1)
            return jax.lax.with_sharding_constraint(context, self.places), token

        with use_abstract_mesh(self.mesh.abstract_mesh):
            context, tokens = jax.lax.scan(step, context, length=count)
        return tokens.T, context

    def _show(self, tokens):
        self.each(np.asarray(tokens))
