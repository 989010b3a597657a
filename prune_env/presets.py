"""Reward presets: how an episode's network is measured, and what that earns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from prune_env.envs.predictor import Foretelling, Predictor
from prune_env.envs.reward import REWARDS, Reward, accuracy
from prune_env.envs.short_training import ShortTraining
from prune_env.pruning.evaluator import Judge
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import Meter
from prune_env.tasks.images import Split
from prune_env.tasks.training import TrainSettings


@dataclass(frozen=True, eq=False)
class Bench:
    """What judges are made from.

    Attributes:
        name: Of what is pruned.
        graph: Its graph.
        steps: The groups that are decided, as positions in `graph.groups`.
        meter: The search split.
        train: Training images, if there are any.
        training: The recipe of these.
        short_steps: Optimiser steps of a short training.
        short_lr: Its peak learning rate.
        predictor: File of coefficients.
        refit: How cut networks are refit.
        recalibrate: Whether their statistics are estimated anew.
        device: Where networks run.
    """

    name: str
    graph: LayerGraph
    steps: tuple[int, ...]
    meter: Meter
    train: Split | None
    training: TrainSettings | None
    short_steps: int
    short_lr: int | float
    predictor: str | None
    refit: str
    recalibrate: bool
    device: str


def instant(bench: Bench) -> None:
    """The evaluator's own judge: accuracy and loss of the network as it is."""


def short_training(bench: Bench) -> Judge:
    """A few steps of training first.

    Raises:
        ValueError: There is nothing to train on.
    """
    if bench.train is None or bench.training is None:
        raise ValueError(f"reward 'short-training' needs a task with a training split; {bench.name!r} has none")
    # One thread: gradients are sums, whose last bits depend on the number of threads.
    settings = dataclasses.replace(bench.training, lr=bench.short_lr, threads=1)
    return ShortTraining(bench.train, settings, bench.short_steps, bench.meter, bench.device)


def predicted(bench: Bench) -> Judge:
    """What a file of coefficients foretells.

    Raises:
        ValueError: The file is none, or was learned on another task, other groups or another repair.
    """
    predictor = Predictor.read(str(bench.predictor))
    channels = tuple(bench.graph.full[list(bench.steps)].tolist())
    predictor.check(task=bench.name, channels=channels, refit=bench.refit, recalibrate=bench.recalibrate)
    return Foretelling(predictor, bench.graph, bench.steps, bench.meter)


MEASURES: dict[str, Callable[[Bench], Judge | None]] = {
    "instant": instant,
    "short-training": short_training,
    "predicted": predicted,
}
"""How the network of an episode is measured."""


@dataclass(frozen=True)
class Preset:
    """What pays an episode.

    Attributes:
        measure: How its network is measured, a name in `MEASURES`.
        reward: What the measurement earns.
    """

    measure: str
    reward: Reward


PRESETS = {
    **{name: Preset("instant", reward) for name, reward in REWARDS.items()},
    "instant": Preset("instant", accuracy),
    "short-training": Preset("short-training", accuracy),
    "predicted": Preset("predicted", accuracy),
}
"""Names of the option `reward`. Another pair of measure and reward is one line."""
