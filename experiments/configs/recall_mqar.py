"""Multi-query associative recall, 8 pairs in 64 tokens, against the size of the state.

    python -m scanax.experiments.train --preset recall-mqar --model.gla.heads 4

A block of a short convolution makes one vector of a key and the value after it; then the mixer has
to keep it: `--model.pattern conv,mamba`, and so on. `evaluate` writes the bytes of the state and
draws the curve over the number of pairs.

One core of an EPYC, held-out answers right in single runs: attention 100 % after 250 steps; GLA
with one head 98.5 % after 1500, with four 21 %, which is about what knowing the row's values gives;
Mamba and Mamba-2 are still there after 1000 steps, also with 4 pairs in 32 tokens.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.recall import RecallTask
from scanax.layers import (
    AarenConfig,
    AttentionConfig,
    GatedConvConfig,
    GLAConfig,
    LightningConfig,
    RetentionConfig,
)
from scanax.models import LMConfig

START = 64**-0.5  # with less, the mixer adds next to nothing for the first hundreds of steps

config = TrainConfig(
    task=RecallTask(
        problem="mqar",
        rows=32,
        length=64,
        items=8,
        model=LMConfig(
            vocab=64,
            width=64,
            depth=2,
            pattern="conv,gla",
            init_std=START,
            conv=GatedConvConfig(init_std=START),
            gla=GLAConfig(heads=1, init_std=START),
            retention=RetentionConfig(init_std=START),
            lightning=LightningConfig(init_std=START),
            aaren=AarenConfig(init_std=START),
            attention=AttentionConfig(init_std=START),
        ),
    ),
    steps=2000,
    validate_every=250,
    optimizer=OptimizerConfig(rate=4e-3, warmup=20),
)
