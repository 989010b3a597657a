"""How polarization and network slimming train: the published constants, and the same on this project's budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from baselines.polarization_scales import UPPER
from prune_env.tasks.dense import usual_training
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainSettings
from prune_env.tasks.training.settings import one_cycle


@dataclass(frozen=True)
class Settings:
    """How a network is trained for pruning.

    Attributes:
        strength: lambda, what the regulariser weighs beside the mean loss (eq. 1).
        t: What its L1 norm weighs (eq. 2).
        epochs: Passes over the training split.
        lr: Highest learning rate of one cycle; not read where there is a schedule.
        schedule: Learning rates as (first epoch, rate), from epoch 0 on; empty for one cycle.
        batch_size: Images per step.
        weight_decay: L2 decay of all parameters, scales included.
        label_smoothing: Share of the target spread over all classes.
        start: Scale of every BatchNorm in a network with new random weights; None goes on from the trained network.
        macs_span: Factors of lambda where a channel of the layer costs the least and the most macs; linear between.

    Raises:
        ValueError: A number outside its range; names the field.
    """

    strength: float
    t: float = 1.0
    epochs: int = 200
    lr: float = 0.1
    schedule: tuple[tuple[int, float], ...] = ()
    batch_size: int = 64
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    start: float | None = 0.5
    macs_span: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        allowed = {
            "strength": (0 <= self.strength < math.inf, "a finite number from 0"),
            "t": (math.isfinite(self.t), "a finite number"),
            "schedule": (not self.schedule or self.schedule[0][0] == 0, "a rate from epoch 0 on"),
            "start": (self.start is None or 0 < self.start <= UPPER, f"None or a number above 0, up to {UPPER:g}"),
            "macs_span": (min(self.macs_span) >= 0 and max(self.macs_span) < math.inf, "two finite numbers from 0"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")

    def rate(self, epoch: int) -> float:
        """The schedule's learning rate in an epoch."""
        return [rate for first, rate in self.schedule if first <= epoch][-1]

    def travel(self, steps: int) -> float:
        """Lambda times the sum of the learning rates of all steps.

        Args:
            steps: Steps of one epoch.
        """
        if self.schedule:
            return self.strength * steps * sum(map(self.rate, range(self.epochs)))
        cycle, total = TrainSettings(epochs=self.epochs, lr=self.lr), steps * self.epochs
        return self.strength * sum(one_cycle(cycle, step=step, steps=total) for step in range(total))

    def training(self, task: Task, *, seed: int) -> TrainSettings:
        """The same for the training loop; augmentation, precision and threads are those of the dense training.

        Args:
            task: Whose network is trained.
            seed: Seed of order and augmentation.

        Raises:
            ValueError: A value that is not allowed; names the field.
        """
        return dataclasses.replace(
            usual_training(task.data, task.network_name, seed=seed),
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
        )


CIFAR_RATES = ((0, 0.01), (1, 0.1), (60, 0.02), (120, 0.004), (160, 0.0008))
IMAGENET_RATES = ((0, 0.1), (40, 0.01), (80, 0.001))
SLIMMING_RATES = ((0, 0.1), (80, 0.01), (120, 0.001))

PAPER: Mapping[str, Settings] = {
    "resnet56": Settings(5e-5, t=1.4, schedule=CIFAR_RATES),
    "vgg16_bn": Settings(3e-5, t=1.5, schedule=CIFAR_RATES),
    "torchvision:resnet50": Settings(
        8e-5, t=1.2, epochs=120, schedule=IMAGENET_RATES, batch_size=512, weight_decay=1e-4
    ),
    "torchvision:mobilenet_v2": Settings(2.5e-5, t=1.0, epochs=256, lr=0.4, batch_size=1024, weight_decay=4e-5),
}
"""Network -> published constants. lambda and t are from the README. So is CIFAR's batch: the README's commands leave
the default of 64; the paper says 128. The last row is for gates beside the norms, with a shorter warm-up than ours."""

SLIMMING_PAPER: Mapping[str, Settings] = {
    "resnet56": Settings(1e-5, epochs=160, schedule=SLIMMING_RATES, weight_decay=1e-4),
    "vgg16_bn": Settings(1e-4, epochs=160, schedule=SLIMMING_RATES, weight_decay=1e-4),
}
"""The same of network slimming: ResNet-164 and VGG-19 on CIFAR-10, https://github.com/Eric-mingjie/network-slimming."""

OTHERS = "resnet56"
"""The row of networks without one."""
IMAGES = {"torchvision:resnet50": 1_281_167, "torchvision:mobilenet_v2": 1_281_167}
"""Training images that a row was published for; 50,000 where it is not named."""

SHARE = 20
"""The scaled training has one epoch for so many published ones."""
EPOCHS = {"digits": 30}
"""Epochs of the scaled training where they are not that share."""


def published(task: Task, *, table: Mapping[str, Settings] = PAPER) -> Settings:
    """The published settings of the task's network.

    Args:
        task: Whose network.
        table: Network -> settings.
    """
    return table.get(task.network_name, table[OTHERS])


def scaled(task: Task, *, table: Mapping[str, Settings] = PAPER, epochs: int | None = None) -> Settings:
    """Published settings on this project's budget: from the trained network, fewer epochs, one cycle, the same travel.

        lambda_ours = lambda_published sum(published rates) / sum(our rates), both over all steps

    So the regulariser alone could move a scale as far as there. Against the loss it is stronger for a shorter time.
    Batches and label smoothing are those of the dense training.

    Args:
        task: Whose network.
        table: Network -> settings.
        epochs: Passes over the training split; None takes one for `SHARE` published ones, or the data set's own.
    """
    row, dense = published(task, table=table), usual_training(task.data, task.network_name, seed=0)
    theirs = row.travel(math.ceil(IMAGES.get(task.network_name, 50_000) / row.batch_size))
    ours = dataclasses.replace(
        row,
        strength=1.0,
        epochs=EPOCHS.get(task.data, row.epochs // SHARE) if epochs is None else epochs,
        schedule=(),
        batch_size=dense.batch_size,
        label_smoothing=dense.label_smoothing,
        start=None,
    )
    return dataclasses.replace(ours, strength=theirs / ours.travel(max(1, len(task.train) // ours.batch_size)))
