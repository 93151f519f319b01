"""AdamW with warm-up and a cosine (arXiv:1711.05101), as an optax transformation and a rate."""

import dataclasses
import math
from typing import Any

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    rate: float = 3e-3
    """Peak learning rate, after the warm-up (per step)."""
    warmup: int = 100
    """Steps over which the rate rises linearly from 0 to its peak."""
    final: float = 0.1
    """Rate at the end, as a fraction of the peak."""
    decay_steps: int | None = None
    """Steps over which the cosine falls; the whole run (steps or minutes) if None."""
    weight_decay: float = 0.1
    """Fraction of a decayed weight taken off a step, times the rate (not from norms, biases,
    decays)."""
    beta1: float = 0.9
    """Decay a step of the gradient's running mean."""
    beta2: float = 0.95
    """Decay a step of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's running mean."""
    clip: float = 1.0
    """Largest global norm of a gradient; 0 leaves gradients alone."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"optimizer.{field.name}={value}; it must be finite")
        for name, least in (("rate", 0.0), ("warmup", 0), ("final", 0.0), ("weight_decay", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}; at least {least}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optimizer.decay_steps={self.decay_steps}; it must be at least 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}; 0 <= {name} < 1")
        if not self.clip >= 0 or not self.eps > 0:
            raise ValueError(f"optimizer.clip={self.clip}, eps={self.eps}; clip >= 0, eps > 0")


def adamw(config: OptimizerConfig, decayed: Any) -> optax.GradientTransformation:
    """Updates of unit rate: the trainer subtracts `learning_rate` times them.

    `decayed` is a tree like the parameters with True where weight decay applies.
    """
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype="float32")
    return optax.chain(clip, adam, optax.add_decayed_weights(config.weight_decay, decayed))


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """The rate of step `step` (from 0); `progress` is the part of the run that is over, 0 to 1."""
    if config.decay_steps is not None:
        progress = step / config.decay_steps
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.rate * warm * (config.final + (1 - config.final) * cosine)
