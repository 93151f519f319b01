"""Bytes of the Python standard library, five minutes on two cores: what `make train` runs."""

from scanax.experiments.config import TrainConfig
from scanax.experiments.tasks.lm import LMTask

config = TrainConfig(task=LMTask(), minutes=4.0)
