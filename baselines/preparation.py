"""The prepare stage of methods that train: a copy of the task's network, trained once under the method's hooks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from prune_env.tasks.prepared import train_once
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainSettings, train
from prune_env.tasks.training.loop import Progress, nesterov


def root_of(task: Task) -> Path | str | None:
    """The data root that a task was made with, under which the cache is; None takes the usual one."""
    root = task.settings.get("root")
    assert root is None or isinstance(root, Path | str)
    return root


def prepared_task(
    task: Task,
    *,
    method: str,
    constants: Mapping[str, object],
    training: TrainSettings,
    hooks: Callable[[nn.Module], Sequence[Hook]] = lambda network: (),
    optimizer: Callable[[nn.Module, TrainSettings], Optimizer] = nesterov,
    progress: Progress | None = None,
) -> Task:
    """The task with a network that a method trained for pruning; a killed training is taken up again.

    Args:
        task: It is left as it is.
        method: The method's name; part of the cache's key.
        constants: Everything beside the training's settings that decides the outcome. JSON can hold it.
        training: Epochs, learning rate and so on.
        hooks: Network -> what the method adds to each step.
        optimizer: Network and settings -> what takes the steps.
        progress: Told about every step.

    Raises:
        ValueError: A corrupt file in the cache.
        TrainingDiverged: The loss became NaN or Inf; the checkpoint holds the last good epoch.
    """
    network = copy.deepcopy(task.network)
    file = train_once(
        network,
        task,
        kind="prepared",
        content={"method": method, **constants, "training": dataclasses.asdict(training)},
        run=lambda checkpoint: train(
            network,
            task.train,
            settings=training,
            hooks=hooks(network),
            optimizer=optimizer,
            progress=progress,
            checkpoint=checkpoint,
        ),
        root=root_of(task),
    )
    settings = {**task.settings, "weights": str(file)}
    return dataclasses.replace(task, network=network.eval(), weights=str(file), settings=settings, dense=None)
