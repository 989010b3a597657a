"""Short training as a judge: what a network is worth after a few steps of the fine-tuning that is to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from prune_env.pruning.evaluator import Worth
from prune_env.pruning.measure import Meter
from prune_env.pruning.plan import Plan
from prune_env.tasks.images import Split
from prune_env.tasks.training import Hook, TrainingDiverged, TrainingState, TrainSettings, train_steps


@dataclass(frozen=True, eq=False)
class ShortTraining:
    """A judge that trains the network it is given, in place, by one cycle of a few steps.

    The network is the one that a fine-tuning would start from: cut, refit and recalibrated as the evaluator does it.
    Every network sees the same images in the same order. A training that diverges leaves a network at chance.

    Attributes:
        split: Training images.
        settings: Recipe and peak learning rate; the same bits come out again with the same number of threads.
        steps: Optimiser steps.
        meter: The search split.
        device: Where to train.
    """

    split: Split
    settings: TrainSettings
    steps: int
    meter: Meter
    device: str = "cpu"

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps after which a training may be stopped, and its end: a quarter, a half, all."""
        return tuple(dict.fromkeys(max(1, self.steps * share // 4) for share in (1, 2, 4)))

    def __call__(self, network: nn.Module, plan: Plan) -> Worth:
        """Accuracy and loss after all steps; measured once."""
        return self._trained(network)

    def raced(self, network: nn.Module, go_on: Callable[[Sequence[float]], bool]) -> Worth:
        """The same, but left at the first rung at which it is not to go on.

        Looking does not move the training: one that reaches its end is worth what an unwatched one is.

        Args:
            network: Trained in place.
            go_on: Told the accuracies at the rungs so far, says whether to train on; not asked at the end.

        Returns:
            What it was worth where it ended, with its accuracy at each rung that it reached.
        """
        seen: list[Worth] = []

        def look(state: TrainingState) -> None:
            if state.step + 1 in self.rungs[:-1]:
                seen.append(self._worth(network, state.step + 1))
                if not go_on([one.accuracy for one in seen]):
                    raise _LeftError

        with suppress(_LeftError):
            seen.append(self._trained(network, Hook(after_step=look)))
        return seen[-1]._replace(rungs=tuple(one.accuracy for one in seen))

    def _trained(self, network: nn.Module, *hooks: Hook) -> Worth:
        """What the network is worth after its training."""
        network.requires_grad_(True)  # a cut network may come without gradients
        try:
            train_steps(network, self.split, steps=self.steps, settings=self.settings, hooks=hooks, device=self.device)
        except TrainingDiverged:
            return self._chance(self.steps)
        return self._worth(network, self.steps)

    def _worth(self, network: nn.Module, steps: int) -> Worth:
        """What the network is worth now."""
        accuracy, loss = self.meter.accuracy_and_loss(network)
        return Worth(accuracy, loss, steps) if math.isfinite(loss) else self._chance(steps)

    def _chance(self, steps: int) -> Worth:
        """What a network is worth that knows nothing."""
        return Worth(1 / self.split.classes, math.log(self.split.classes), steps)


class _LeftError(Exception):
    """A training was left at a rung."""
