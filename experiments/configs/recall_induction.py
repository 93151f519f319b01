"""Induction heads, trained at 256 tokens and read up to 8192: `evaluate` draws the curve.

    python -m scanax.experiments.train --preset recall-induction
    python -m scanax.experiments.evaluate --checkpoint runs/recall-induction

Not solved yet: in a trial of 8 rows a step at a rate of 4e-3 every answer was still a guess after
1100 steps (two minutes of one core of an EPYC). A row has one answer, so steps here take 32.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.recall import RecallTask
from scanax.models import LMConfig

config = TrainConfig(
    task=RecallTask(
        problem="induction",
        rows=8,
        length=256,
        items=8,
        model=LMConfig(vocab=16, width=64, depth=2, pattern="mamba", init_std=0.125),
    ),
    steps=1000,
    validate_every=250,
    optimizer=OptimizerConfig(rate=4e-3, warmup=20),
)
