"""TBD"""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.video import VideoTask
from scanax.layers import ConvLSTMConfig, ConvS5Config, MLPConfig
from scanax.models import VideoConfig

config = TrainConfig(
    task=VideoTask(
        model=VideoConfig(
            size=(32, 32),
            patch=4,
            stages=(32,),
            groups=8,
            width=32,
            depth=3,
            convs5=ConvS5Config(block="resnet", groups=8),
            mlp=MLPConfig(hidden=512),
            convlstm=ConvLSTMConfig(hidden=20),
        ),
    ),
    steps=400,
    validate_every=100,
    optimizer=OptimizerConfig(warmup=20, weight_decay=1e-5),
)
