"""LAB RECORD."""

from scanax.experiments.config import TrainConfig
from scanax.experiments.optimizer import OptimizerConfig
from scanax.experiments.tasks.forecast import ForecastTask

config = TrainConfig(
    task=ForecastTask(),
    steps=400,
    validate_every=100,
    optimizer=OptimizerConfig(rate=3e-3, warmup=20),
)
