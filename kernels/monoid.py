"""A sequence mixer is a monoid over spans of tokens, and a schedule is a way to cut the sequence.

Summarise a span, combine two neighbouring summaries, read outputs given the summary of all
before: tokens, chunks, devices and KV splits are four cuts of one definition.

Elements are pytrees of arrays. In the schedules the leading axis is time; `combine` takes the
earlier span first, is associative and, in general, not commutative.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Element = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class Monoid:
    """`identity(like)` is the neutral element shaped as `like`; `combine(earlier, later)`."""

    identity: Callable[[Element], Element]
    combine: Callable[[Element, Element], Element]


def broadcast(log, state):
    """exp(log) * state, `log` spread over the trailing axes of `state` that it lacks.

    log (B, H) in nats, not positive, goes with a state (B, H, K, V), and so on.
    """
    return jnp.exp(log.reshape(log.shape + (1,) * (state.ndim - log.ndim))) * state


def decay(scale: Callable[[Any, Any], Any] = broadcast) -> Monoid:
    """(l1, S1) o (l2, S2) = (l1 + l2, exp(l2) S1 + S2), `scale(log, state)` applying exp(log).

    The log is any pytree that adds: one number a head, a vector over K, the sum of Mamba's delta
    (`scale` then multiplies it by A), a real and imaginary pair. It is in nats and not positive.
    """

    def combine(earlier, later):
        (l1, s1), (l2, s2) = earlier, later
        return jax.tree.map(jnp.add, l1, l2), jax.tree.map(jnp.add, scale(l2, s1), s2)

    return Monoid(lambda like: jax.tree.map(jnp.zeros_like, like), combine)


LOWEST = -1e30
"""The maximum of an empty set: finite, so that no inf - inf arises."""


def _softmax_identity(like):
    m, u, w = like
    return jnp.full_like(m, LOWEST), jnp.zeros_like(u), jnp.zeros_like(w)


def _softmax_combine(earlier, later):
    (m1, u1, w1), (m2, u2, w2) = earlier, later
    m = jnp.maximum(m1, m2)
    a1, a2 = jnp.exp(m1 - m), jnp.exp(m2 - m)
    return m, a1 * u1 + a2 * u2, a1[..., None] * w1 + a2[..., None] * w2


COUNT = Monoid(lambda like: jax.tree.map(jnp.zeros_like, like), jnp.add)
"""How many tokens a span has: positions."""
DECAY = decay()
"""(log decay, state): linear attention and state-space models."""
SOFTMAX = Monoid(_softmax_identity, _softmax_combine)
"""(maximum score, sum of exp(score - maximum), the same sum weighted by values); reads w / u."""


def resettable(monoid: Monoid) -> Monoid:
    """The same monoid with a flag: an element whose flag is set forgets all before it, exactly.

    Elements are (flag, element); a flag has the element's leading axes.
    """

    def combine(earlier, later):
        (r1, e1), (r2, e2) = earlier, later
        return r1 | r2, monoid.combine(select(r2, monoid.identity(e1), e1), e2)

    return Monoid(lambda like: (jnp.zeros_like(like[0]), monoid.identity(like[1])), combine)


def select(flag, if_true: Element, if_false: Element) -> Element:
    """`where` over pytrees, the flag spread over the trailing axes that it lacks.

    flag (B,), if_true (B, ...) and if_false (B, ...).
    """

    def one(x, y):
        return jnp.where(flag.reshape(flag.shape + (1,) * (x.ndim - flag.ndim)), x, y)

    return jax.tree.map(one, if_true, if_false)


# Schedules. All return the same numbers, up to rounding.


def scan(monoid: Monoid, elements: Element, prefix: Element) -> Element:
    """Inclusive prefixes, token after token: elements (T, ...), prefix (...), result (T, ...)."""

    def step(carry, element):
        carry = monoid.combine(carry, element)
        return carry, carry

    return jax.lax.scan(step, prefix, elements)[1]


def associative(monoid: Monoid, elements: Element, prefix: Element) -> Element:
    """Inclusive prefixes in 2 log2(T) parallel steps and about twice the combines.

    elements (T, ...), prefix (...), result (T, ...).
    """
    inside = jax.lax.associative_scan(monoid.combine, elements)
    spread = jax.tree.map(lambda p, e: jnp.broadcast_to(p, e.shape), prefix, inside)
    return monoid.combine(spread, inside)


def fold(monoid: Monoid, elements: Element) -> Element:
    """The summary (...) of the whole span of elements (T, ...), as a tree."""
    while (size := jax.tree.leaves(elements)[0].shape[0]) > 1:
        pairs = jax.tree.map(lambda x, n=size // 2 * 2: x[:n], elements)
        odd = jax.tree.map(lambda x, n=size // 2 * 2: x[n:], elements)
        halved = monoid.combine(
            jax.tree.map(lambda x: x[0::2], pairs), jax.tree.map(lambda x: x[1::2], pairs)
        )
        elements = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), halved, odd)
    return jax.tree.map(lambda x: x[0], elements)
