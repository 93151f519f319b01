"""Multi-query associative recall, 16 pairs in 64 tokens, against the size of the state.

    python -m scanax.experiments.train --preset recall-mqar --model.mamba.state 4

Other mixers by --model.pattern: gla, retention, mamba2, aaren, attention; `evaluate` writes the
bytes of the state and draws the curve over the number of pairs.

FIGURES
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
    steps=2000,
    validate_every=500,
    optimizer=OptimizerConfig(rate=4e-3, warmup=20),
)
