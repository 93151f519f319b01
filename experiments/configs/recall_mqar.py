"""Multi-query associative recall, 16 pairs in 64 tokens, against the size of the state.

    python -m scanax.experiments.train --preset recall-mqar --model.mamba.state 4

Other mixers by --model.pattern: gla, retention, mamba2, aaren, attention; `evaluate` writes the
bytes of the state and draws the curve over the number of pairs.

One core of an EPYC, busy, seed 0, held-out answers right in trials of 1000 steps, where none has
come far: gla 26 % (75 ms of its time a step), mamba 14 % (115 ms), attention 9 % (29 ms); a guess
among the values of the row is 6 %. All 5000 steps, and other sizes of state, are not measured.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.recall import RecallTask
from scanax.layers import AttentionConfig, GLAConfig, RetentionConfig
from scanax.models import LMConfig

config = TrainConfig(
    task=RecallTask(
        problem="mqar",
        rows=32,
        length=64,
        items=16,
        model=LMConfig(
            vocab=64,
            width=64,
            depth=2,
            pattern="mamba",
            init_std=0.125,
            gla=GLAConfig(heads=2, conv=4),
            retention=RetentionConfig(heads=2, conv=4),
            attention=AttentionConfig(heads=2),
        ),
    ),
    steps=5000,
    validate_every=500,
    optimizer=OptimizerConfig(rate=4e-3, warmup=20),
)
