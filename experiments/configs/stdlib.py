"""Bytes of the Python standard library, four and a half minutes on two cores: `make train`.

    329 steps (0.67 million bytes): 1.97 held-out bits per byte (order 2: 2.63); on busy cores 210
    steps and 2.13

Mamba learns most from few bytes: in a rough comparison, gated linear attention of the same size
stood at 2.61 after 0.48 million bytes with short convolutions (--model.gla.conv 4), and at 3.06
without.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.lm import LMTask
from scanax.models import LMConfig

config = TrainConfig(
    task=LMTask(
        rows=8,
        length=256,
        final_batches=128,
        model=LMConfig(width=160, depth=8, pattern="mamba+none"),
    ),
    minutes=4.5,
    validate_every=100,
    optimizer=OptimizerConfig(warmup=20),
)
