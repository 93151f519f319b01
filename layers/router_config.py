"""What is said of a router."""

import dataclasses
from typing import Literal

OPTIONS: dict[str, tuple[str, ...]] = {  # of a kind of router, those that not all have
    "softmax": ("renormalize", "pooled"),
    "gshard": ("pooled",),
    "switch": ("jitter", "pooled"),
    "noisy": (),
    "cosine": ("renormalize", "cosine_width", "temperature", "pooled"),
    "sigmoid": ("bias_rate", "scale", "groups", "kept_groups", "pooled"),
    "expert-choice": (),
}
FIXED = {"gshard": 2, "switch": 1}  # experts of a token


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Who chooses the experts, and what keeps their load even.

    Mixtral is arXiv:2401.04088, GShard arXiv:2006.16668, Switch arXiv:2101.03961, noisy
    arXiv:1701.06538, X-MoE arXiv:2204.09179, DeepSeek-V3 arXiv:2412.19437, expert choice
    arXiv:2202.09368, ST-MoE arXiv:2202.08906. Raises ValueError for options of another kind, and
    for numbers that cannot be.
    """

    kind: Literal["softmax", "gshard", "switch", "noisy", "cosine", "sigmoid", "expert-choice"] = (
        "softmax"
    )
    """softmax: the most probable (Mixtral). gshard: two, the second at random by its weight.
    switch: one, weighted by its probability. noisy: the most probable after learned noise.
    cosine: by the angle to each expert (X-MoE). sigmoid: a bias keeps the load even, instead of a
    loss (DeepSeek-V3). expert-choice: experts choose tokens; not for causal models."""
    top: int | None = None
    """Experts of a token; expert-choice: on average. None: 1 for switch, else 2."""
    renormalize: bool = True
    """Whether a token's weights are divided by their sum (softmax, cosine)."""
    jitter: float = 0.01
    """switch: in training a token is multiplied by numbers drawn from 1 +- this."""
    cosine_width: int = 32
    """cosine: features of the space that angles are measured in."""
    temperature: float = 0.5
    """cosine: what cosines are divided by at first; it is learned."""
    bias_rate: float = 1e-3
    """sigmoid: how much an expert's bias goes up or down after a step."""
    scale: float = 1.0
    """sigmoid: what the weights are multiplied by."""
    groups: int = 1
    """sigmoid: groups of experts, of which only some are chosen from."""
    kept_groups: int = 1
    """sigmoid: how many groups a token's experts are of."""
    balance: float | None = None
    """Coefficient of the loss that evens the load: experts x sum of share x probability, 1 when
    even; noisy: the squared coefficients of variation of importance and load. None: 0.01, and for
    sigmoid 0."""
    pooled: bool = False
    """Whether that loss is of the mean share and probability over all layers (Mixtral), rather than
    the sum of the layers' losses."""
    z: float = 1e-3
    """Coefficient of the mean squared logsumexp of the logits (ST-MoE), summed over layers."""
    init_std: float = 0.02
    """Standard deviation of the router's initial weights."""

    def __post_init__(self):
        if self.kind not in OPTIONS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(OPTIONS)}")
        for field in dataclasses.fields(self):
            only = [kind for kind, options in OPTIONS.items() if field.name in options]
            value = getattr(self, field.name)
            if only and self.kind not in only and value != field.default:
                raise ValueError(f"{field.name}={value} is for router {' or '.join(only)}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top={self.top}; it must be at least 1")
        fixed = FIXED.get(self.kind, self.top)
        if self.top is not None and self.top != fixed:
            raise ValueError(f"top={self.top}; router {self.kind} chooses {fixed}")
        for name in ("temperature", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must be more than 0")
        for name in ("bias_rate", "balance", "z", "init_std"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter}; it must be 0 or more, and less than 1")

    @property
    def choices(self) -> int:
        """k, the experts of a token."""
        return self.top or FIXED.get(self.kind, 2)
