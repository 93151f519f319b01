"""Selective copying, 16 items in 256 tokens: two layers of Mamba learn it, without selection not.

    python -m scanax.experiments.train --preset recall-selective-copying
    python -m scanax.experiments.train --preset recall-selective-copying --model.mamba.no-selective

FIGURES
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.recall import RecallTask
from scanax.models import LMConfig

config = TrainConfig(
    task=RecallTask(
        problem="selective-copying",
        rows=8,
        length=256,
        items=16,
        model=LMConfig(vocab=16, width=64, depth=2, pattern="mamba", init_std=0.125),
    ),
    steps=6000,
    validate_every=500,
    optimizer=OptimizerConfig(rate=4e-3, warmup=20),
)
