"""Which experts of a mixture each token goes to, with what weight and in which slot, and losses.

All is computed in float32 at least. Of equal scores the lowest index wins. Gradients flow through
weights and probabilities, never through indices. Leading axes of tokens may lie over devices:
experts are found by reductions, where `jax.lax.top_k` would gather the tokens.

Letters beside those of the folder: k experts of a token, n tokens, L a router's logits, p their
softmax, f an expert's share of the assignments, P its mean probability.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

BLOCK = 32  # assignments that `ranks` compares pair by pair


class Routing(NamedTuple):
    """What a router decides about each token."""

    experts: Int[Array, "*batch k"]
    """int32, distinct; the number E means none."""
    weights: Float[Array, "*batch k"]
    """Zero where there is none."""
    probabilities: Float[Array, "*batch E"]
    """The router's own, of all experts, without noise: for the balance loss and statistics."""


def softmax(logits: Float[Array, "*batch E"], k: int, *, renormalize: bool) -> Routing:
    """The k largest p; weights p_e, renormalised p_e / (sum of the k p).

    Mixtral, arXiv:2401.04088, renormalises; Jamba, arXiv:2403.19887, does not.
    """
    logits = _wide(logits)
    experts, p = _top(logits, k), jax.nn.softmax(logits, -1)
    weights = jax.nn.softmax(_at(logits, experts), -1) if renormalize else _at(p, experts)
    return Routing(experts, weights, p)


def gshard(logits: Float[Array, "*batch E"], key: PRNGKeyArray | None = None) -> Routing:
    """The two largest p, with weights g_i = p_i / (p_1 + p_2)  (arXiv:2006.16668).

    With a key the second expert is kept with probability min(1, 2 g_2); g_1 stays as it is.
    """
    experts, weights, probabilities = softmax(logits, 2, renormalize=True)
    if key is not None:
        draw = jax.random.uniform(key, weights.shape[:-1], jnp.float32)
        kept = (draw < 2 * weights[..., 1])[..., None] | jnp.asarray([True, False])
        experts = jnp.where(kept, experts, jnp.int32(logits.shape[-1]))
        weights = jnp.where(kept, weights, 0)
    return Routing(experts, weights, probabilities)


def switch(logits: Float[Array, "*batch E"]) -> Routing:
    """The expert with the largest p, and weight p  (Switch, arXiv:2101.03961)."""
    return softmax(logits, 1, renormalize=False)


def jitter(
    x: Float[Array, "*shape"], key: PRNGKeyArray, amount: float = 0.01
) -> Float[Array, "*shape"]:
    """Each element of a router's input times its own U(1 +- amount), in training  (Switch)."""
    factors = jax.random.uniform(key, x.shape, jnp.float32, 1 - amount, 1 + amount)
    return (x * factors).astype(x.dtype)


def noisy(
    logits: Float[Array, "*batch E"],
    noise_logits: Float[Array, "*batch E"],
    k: int,
    key: PRNGKeyArray | None = None,
) -> tuple[Routing, Float[Array, "E"], Float[Array, "E"]]:
    """Softmax over the k largest H = L + N(0, 1) s, s = softplus(noise_logits) (arXiv:1701.06538).

    Also each expert's importance and load, means over all tokens: of its weight, and of the chance
    that it is chosen if its own noise is drawn again, Phi((L - threshold) / s), the threshold being
    the k-th largest H of the others; in Phi s is 1e-6 at least. Without a key there is no noise,
    and load counts the tokens that have the expert.
    """
    clean, number = _wide(logits), logits.shape[-1]
    tokens = tuple(range(clean.ndim - 1))
    deviation = jax.nn.softplus(_wide(noise_logits))
    noise = 0 if key is None else jax.random.normal(key, clean.shape, jnp.float32)
    scores = clean + noise * deviation
    ranked = _top(scores, k + (k < number))
    experts = ranked[..., :k]
    weights = jax.nn.softmax(_at(scores, experts), -1)
    chosen = _hot(experts, number)
    importance = jnp.mean(jnp.sum(jnp.where(chosen, weights[..., None], 0), -2), tokens)
    kept = jnp.any(chosen, -2)
    if key is None or k == number:
        share = kept.astype(clean.dtype)
    else:
        ends = _at(scores, ranked[..., k - 1 :])  # the k-th largest and the next
        threshold = jnp.where(kept, ends[..., 1:], ends[..., :1])
        share = jax.scipy.special.ndtr((clean - threshold) / jnp.maximum(deviation, 1e-6))
    p = jax.nn.softmax(clean, -1)
    return Routing(experts, weights, p), importance, jnp.mean(share, tokens)


def sigmoid(
    logits: Float[Array, "*batch E"],
    bias: Float[Array, "E"],
    k: int,
    *,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
) -> Routing:
    """k largest of s + bias, s = sigmoid(L); weights scale s_e / (sum of the k s + 1e-20).

    DeepSeek-V3, arXiv:2412.19437. The bias has no gradient; `rebalanced` moves it. Of equal groups
    of neighbours only `kept_groups` can be chosen from, those whose two largest s + bias have the
    largest sums. Probabilities are s divided by the sum of all s.
    """
    number = logits.shape[-1]
    if number % groups or not 1 <= kept_groups <= groups or kept_groups * (number // groups) < k:
        raise ValueError(f"{k=} of {number} experts in {groups=} with {kept_groups=}")
    logits = _wide(logits)
    scores = jax.nn.sigmoid(logits) + _wide(bias)
    if groups > 1:
        grouped = scores.reshape(*scores.shape[:-1], groups, -1)
        best = jnp.sum(_at(grouped, _top(grouped, min(2, number // groups))), -1)
        kept = jnp.any(_hot(_top(best, kept_groups), groups), -2)
        scores = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
    experts = _top(scores, k)
    logs = jax.nn.log_sigmoid(logits)  # ratios of s from its log: s and its square may underflow
    terms = [_at(logs, experts), jnp.full_like(logs[..., :1], math.log(1e-20))]
    weights = jax.nn.softmax(jnp.concatenate(terms, -1), -1)[..., :-1]
    return Routing(experts, scale * weights, jax.nn.softmax(logs, -1))


def rebalanced(bias: Float[Array, "E"], load: Float[Array, "E"], rate: float) -> Float[Array, "E"]:
    """b_e + rate sign(mean load - load_e): the router's bias after a step  (arXiv:2408.15664)."""
    mean = jnp.mean(load)
    rounding = 8 * jnp.finfo(load.dtype).eps * mean
    short = jnp.where(jnp.abs(mean - load) > rounding, mean - load, 0)
    return bias + (rate * jnp.sign(short)).astype(bias.dtype)


def expert_choice(logits: Float[Array, "B T E"], capacity: int) -> Routing:
    """Each expert takes the `capacity` tokens of a row that have the largest p (arXiv:2202.09368).

    The weight is p; k = E, and experts[..., e] is e or none. Not causal: later tokens compete.
    """
    if not 1 <= capacity <= logits.shape[1]:
        raise ValueError(f"{capacity=} of {logits.shape[1]} tokens")
    number = logits.shape[-1]
    p = jax.nn.softmax(_wide(logits), -1)
    taken = _largest(jax.lax.stop_gradient(p), capacity)
    experts = jnp.where(taken, jnp.arange(number, dtype=jnp.int32), jnp.int32(number))
    return Routing(experts, jnp.where(taken, p, 0), p)


def cosine_logits(
    h: Float[Array, "*batch d"], vectors: Float[Array, "E d"], log_temperature: Float[Array, ""]
) -> Float[Array, "*batch E"]:
    """<h, e> / (|h| |e|) / tau, tau = max(exp(log_temperature), 0.01)  (X-MoE, arXiv:2204.09179).

    Lengths count as 1e-6 at least, so that h = 0 has logits 0 and finite gradients.
    """
    inverse = jnp.exp(-jnp.maximum(_wide(log_temperature), math.log(0.01)))
    units = _unit(_wide(h)), _unit(_wide(vectors))
    return inverse * jnp.einsum("...d,ed->...e", *units, precision=jax.lax.Precision.HIGHEST)


def load(experts: Int[Array, "*batch k"], E: int, *, first: bool = False) -> Float[Array, "E"]:
    """f_e: expert e's share of all assignments, or of the first choices; none is not counted."""
    chosen = _hot(experts[..., :1] if first else experts, E)
    counts = jnp.sum(chosen, tuple(range(experts.ndim)), dtype=jnp.int32).astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts), 1)


def balance(load: Float[Array, "*loads E"], probabilities: Float[Array, "*batch E"]) -> Array:
    """E sum_e f_e P_e, each a mean over leading axes: 1 when balanced, E when one expert has all.

    GShard and Switch take f of first choices; Mixtral's loss is k times that with f of all.
    """
    f, P = (jnp.mean(_wide(x), tuple(range(x.ndim - 1))) for x in (load, probabilities))
    return f.shape[0] * jnp.sum(jax.lax.stop_gradient(f) * P)


def cv2(x: Float[Array, "E"]) -> Array:
    """Variance / mean^2, the squared coefficient of variation; 0 for one expert and for x = 0."""
    x = _wide(x)
    mean = jnp.mean(x)
    ratio = x / jnp.where(mean == 0, 1, mean)
    return jnp.mean((ratio - jnp.mean(ratio)) ** 2)


def z(logits: Float[Array, "*batch E"]) -> Array:
    """Mean of logsumexp(L)^2 over tokens  (ST-MoE, arXiv:2202.08906)."""
    return jnp.mean(jax.nn.logsumexp(_wide(logits), -1) ** 2)


def entropy(probabilities: Float[Array, "*batch E"]) -> Array:
    """Mean of -sum_e p_e log p_e over tokens, in nats; 0 log 0 = 0, with gradient 0."""
    p = _wide(probabilities)
    some = p > jnp.finfo(p.dtype).tiny
    return jnp.mean(-jnp.sum(jnp.where(some, p * jnp.log(jnp.where(some, p, 1)), 0), -1))


def ranks(
    experts: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    E: int,
    *,
    by: Literal["order", "score"],
) -> Int[Array, "n k"]:
    """How many assignments stand before each in the queue of its expert: its slot, int32.

    All first choices stand before all second ones. Within them tokens stand in order, or by
    descending largest weight (batch-prioritised, arXiv:2106.05974). None has any number.
    """
    if by not in ("order", "score"):
        raise ValueError(f"by={by!r} is neither 'order' nor 'score'")
    (n, k), order = experts.shape, None
    if by == "score":
        order = jnp.argsort(jnp.max(weights, -1), stable=True, descending=True)
        experts = experts[order]
    slots = _earlier(experts.T.reshape(-1), E).reshape(k, n).T
    return slots if order is None else jnp.zeros_like(slots).at[order].set(slots)


def capacity(tokens: int, E: int, k: int, factor: float) -> int:
    """k int(factor ceil(tokens / E)), at least 1: slots of an expert  (Tutel, arXiv:2206.03382)."""
    return max(1, k * int(factor * -(-tokens // E)))


def _wide(x):
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _hot(indices, size):
    """(..., size): which number each index is; none is no one."""
    return indices[..., None] == jnp.arange(size, dtype=jnp.int32)


def _at(x, indices):
    """x[..., indices] along the last axis, 0 for none; its gradient needs no scatter."""
    return jnp.sum(jnp.where(_hot(indices, x.shape[-1]), x[..., None, :], 0), -1)


def _top(scores, k):
    """The k indices of the largest scores, descending; nan counts as the largest."""
    size = scores.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"{k=} of {size}")
    scores = jax.lax.stop_gradient(scores)
    scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)  # -inf is for those already taken
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    each, found = jnp.arange(size, dtype=jnp.int32), []
    for _ in range(k):  # argmax is several times slower than these two on a CPU
        largest = scores == jnp.max(scores, -1, keepdims=True)
        found.append(jnp.min(jnp.where(largest, each, size), -1))
        scores = jnp.where(_hot(found[-1], size), -jnp.inf, scores)
    return jnp.stack(found, -1)


def _largest(p, count):
    """(B, T, E) bool: the `count` largest p >= 0 of each row and expert, the earlier of equals.

    Floats that are not negative are in order as integers, so that the smallest one taken is found
    bit by bit, and likewise the last token at it: devices only add counts, and nothing is sorted.
    """
    bits = jnp.finfo(p.dtype).bits - 1
    integers = jnp.dtype(f"int{bits + 1}")

    def reached(numbers, among, count, bits):  # the largest that `count` of `among` reach
        def bit(i, found):
            trial = found | jnp.left_shift(jnp.ones_like(found), bits - 1 - i)
            reach = jnp.sum(among & (numbers >= trial), 1, keepdims=True, dtype=jnp.int32)
            return jnp.where(reach >= count, trial, found)

        return jax.lax.fori_loop(0, bits, bit, jnp.zeros_like(numbers[:, :1]))

    value = jax.lax.bitcast_convert_type(p, integers) & jnp.iinfo(integers).max
    smallest = reached(value, True, count, bits)
    above, level = value > smallest, value == smallest
    missing = count - jnp.sum(above, 1, keepdims=True, dtype=jnp.int32)
    places = jnp.arange(p.shape[1], 0, -1, dtype=jnp.int32)[:, None] + jnp.zeros_like(value)
    last = reached(places, level, missing, p.shape[1].bit_length())
    return above | (level & (places >= last))


def _earlier(experts, E):
    """(m,): how many equal numbers stand before each: counts of whole blocks, and pairs inside."""
    m = experts.shape[0]
    blocks = jnp.pad(experts, (0, -m % BLOCK), constant_values=E).reshape(-1, BLOCK)
    counts = jnp.sum(_hot(blocks, E), 1, dtype=jnp.int32)
    before = jnp.cumsum(counts, 0, dtype=jnp.int32) - counts
    earlier = jnp.tril(jnp.ones((BLOCK, BLOCK), bool), -1)
    inside = (blocks[:, :, None] == blocks[:, None, :]) & earlier
    base = jnp.take_along_axis(before, jnp.minimum(blocks, E - 1), 1)
    return (base + jnp.sum(inside, -1, dtype=jnp.int32)).reshape(-1)[:m]


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
