"""Multi-query associative recall, 8 pairs in 64 tokens, against the size of the state.

    python -m scanax.experiments.train --preset recall-mqar --model.gla.heads 4

A block of a short convolution makes one vector of a key and the value after it; then the mixer has
to keep it: `--model.pattern conv,mamba`, and so on. `evaluate` writes the bytes of the state and
draws the curve over the number of pairs.

`python -m scanax.experiments.reproduce recall-mqar` measures all mixers. A row's likeliest value is
right 21 times in 100; a run that does not find the pairs stays there. Mamba does not leave it with
any state, nor, in trials of 1000 to 1500 steps, with RMS norms of B and C, A = -1/2 throughout,
step sizes from 1e-4 to 0.01, a rate of 1e-3, its output normed as Mamba-2's is, two layers of
Mamba, or 4 pairs in 32 tokens (there 35 %). What moved it was Mamba-2's way to B and C, from the
block's input instead of the convolved channels that are the values too: 30 % after 1000 steps, with
64 numbers, normed.
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
