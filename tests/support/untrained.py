"""A run's directory around a model that was drawn, not trained: quick, with uneven logits."""

from pathlib import Path

from flax import nnx
from scanax.experiments.config import TrainConfig, to_json
from scanax.experiments.datasets.text import DataConfig
from scanax.experiments.saving import Saver
from scanax.experiments.tasks.lm import LMTask
from scanax.layers.attention import AttentionConfig
from scanax.layers.gla import GLAConfig
from scanax.models import LMConfig, split

SMALL = LMConfig(
    width=16,
    depth=2,
    pattern="gla+swiglu",
    tie_head=False,
    init_std=0.2,
    gla=GLAConfig(heads=2, init_std=0.2),
    attention=AttentionConfig(heads=2, init_std=0.2),
)


def save(folder: Path, model: LMConfig = SMALL, data: DataConfig | None = None, **shape) -> Path:
    """Checkpoints of steps 1 and 2, of different weights; the first has the better loss."""
    task = LMTask(model=model, data=data or DataConfig(), **{"rows": 2, "length": 8, **shape})
    config = to_json(TrainConfig(task=task, run=str(folder)))
    saver = Saver(folder, config, keep=2, files=task.files())
    params = task.by_layer(split(task.build(nnx.Rngs(0)))[1])
    for step in (1, 2):
        scaled = {name: step * leaf for name, leaf in params.items()}
        saver.save(step, {"params": scaled}, {"seconds": 0.0}, metric=float(step))
    saver.wait()
    return folder
