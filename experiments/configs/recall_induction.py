"""Induction heads, trained at 256 tokens and read up to 8192: `evaluate` draws the curve.

    python -m scanax.experiments.train --preset recall-induction
    python -m scanax.experiments.evaluate --checkpoint runs/recall-induction

Rows to train on ask eight times. With one question a row, as in the paper, every answer was still a
guess after 1100 steps; with eight all are right after 300, in a trial with seed 0, a minute of one
core of an EPYC. Other mixers beside it: `python -m scanax.experiments.reproduce recall-induction`.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.recall import RecallTask
from scanax.layers import AarenConfig, AttentionConfig, GatedConvConfig, GLAConfig
from scanax.models import LMConfig

START = 64**-0.5  # with less, a mixer adds next to nothing for the first hundreds of steps

config = TrainConfig(
    task=RecallTask(
        problem="induction",
        rows=8,
        length=256,
        items=8,
        model=LMConfig(
            vocab=16,
            width=64,
            depth=2,
            pattern="mamba",
            init_std=START,
            conv=GatedConvConfig(init_std=START),
            gla=GLAConfig(init_std=START),
            aaren=AarenConfig(init_std=START),
            attention=AttentionConfig(init_std=START),
        ),
    ),
    steps=500,
    validate_every=100,
    optimizer=OptimizerConfig(rate=4e-3, warmup=20),
)
