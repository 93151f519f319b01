"""ViR on scikit-learn's digits, 16 x 16 pixels in 64 patches: a minute on one core.

A ViT of equal size: `--model.pattern attention+gelu`; one that sees earlier patches only:
`--model.attention.causal` besides. ViR with patches read twice: `--model.bidirectional`.

All four over seeds 0, 1 and 2: `python -m scanax.experiments.reproduce vision`.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.vision import VisionTask
from scanax.layers import AttentionConfig, MLPConfig, VirConfig
from scanax.models import ResidualConfig, VisionConfig

HEADS, WIDTH = 4, 48
START = WIDTH**-0.5  # with less, the blocks add next to nothing for the first hundreds of steps

config = TrainConfig(
    task=VisionTask(
        rows=48,
        model=VisionConfig(
            image=(16, 16),
            channels=1,
            patch=2,
            classes=10,
            width=WIDTH,
            depth=3,
            mlp=MLPConfig(ratio=4.0, bias=True, init_std=START),
            residual=ResidualConfig(),
            vir=VirConfig(heads=HEADS, init_std=START),
            attention=AttentionConfig(
                heads=HEADS,
                causal=False,
                rope_base=None,
                bias=True,
                out_bias=True,
                init_std=START,
            ),
        ),
    ),
    steps=400,
    validate_every=100,
    optimizer=OptimizerConfig(warmup=20),
)
