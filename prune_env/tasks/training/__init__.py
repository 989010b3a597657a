"""The one training loop: dense training, preparation and fine-tuning all go through `train`.

`python -m prune_env.tasks.training --task cifar10-resnet20` trains a task's dense network and caches it.
"""

from prune_env.tasks.training.hooks import Hook, TrainingState
from prune_env.tasks.training.loop import TrainingDiverged, TrainReport, train
from prune_env.tasks.training.settings import TrainSettings
from prune_env.tasks.training.short import train_steps

__all__ = ["Hook", "TrainReport", "TrainSettings", "TrainingDiverged", "TrainingState", "train", "train_steps"]
