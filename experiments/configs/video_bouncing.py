"""A digit that bounces in frames of 32 x 32, the next frame predicted, by ConvS5.

    python -m scanax.experiments.train --preset video-bouncing
    python -m scanax.experiments.evaluate --checkpoint runs/video-bouncing

Others of equal size: `--model.pattern convlstm`, and `--model.pattern attention+gelu
--model.attention.window 1024`, a transformer over the places of 16 frames. `evaluate` rolls them
out: errors and seconds by frame, a film strip and a GIF. All three are measured by
`python -m scanax.experiments.reproduce video`.

One core of an EPYC, held-out squared errors of a pixel in the next frame after 500 steps of a
trial, seed 5: ConvS5 0.0120 (2 minutes), ConvLSTM 0.0128 (1.5), attention 0.0141 (7; 0.0144 with
first weights of deviation 0.177, 0.0141 at width 48 and hidden 272). With two digits 500 steps are
too few: roll-outs run together into a blot after 8 frames. ConvS5 with 2 clips of 64 frames a step,
1500 steps and 32 frames given comes to 0.0102, and to 0.142 at the end of a roll-out of 64; digits
of 8 x 8 in frames of 24 x 24 to 0.0242.
"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.video import VideoTask
from scanax.layers import AttentionConfig, ConvLSTMConfig, ConvS5Config, MLPConfig
from scanax.models import VideoConfig

config = TrainConfig(
    task=VideoTask(
        rows=4,
        digits=1,
        speed=0.05,
        rollouts=64,
        model=VideoConfig(
            size=(32, 32),
            patch=4,
            stages=(32,),
            groups=8,
            width=32,
            depth=3,
            convs5=ConvS5Config(block="resnet", groups=8),
            convlstm=ConvLSTMConfig(hidden=20),
            attention=AttentionConfig(heads=2),
            mlp=MLPConfig(hidden=512),
        ),
    ),
    steps=500,
    validate_every=100,
    optimizer=OptimizerConfig(warmup=50, weight_decay=1e-5),
)
