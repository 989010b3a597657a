"""A race: short trainings of weak plans are stopped early, so that the same time measures more plans.

    earlier plans' accuracies at each rung -> whether a plan goes on there

The rule of ASHA (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, arXiv 1810.05934), told
one plan after another and with a quantile in the place of the top 1/eta. Deviation: a plan that was stopped is not
taken up again later. With the median it is close to the stopping rule of Google Vizier (Golovin et al., KDD 2017) on
running means. What a race decides is a function of the plans before it: same history, same race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from prune_env.envs.short_training import ShortTraining
from prune_env.pruning.evaluator import Evaluator, Worth
from prune_env.pruning.measure import Measurement
from prune_env.pruning.plan import Plan

LEAST = 4
"""Plans that must have been at a rung before one is stopped there."""
RACERS = ("random_search", "cem", "evolution")
"""Optimisers that read nothing of rewards but their order, of plans inside the budget. Annealing is warmed by their
differences, and NetAdapt's first plans, above the budget, would set a bar that no later one can reach."""
STOPPED = "stopped"
"""The term of the reward that puts stopped plans behind all others."""


@dataclass(frozen=True)
class Race:
    """What a plan has to beat.

    Attributes:
        earlier: Accuracies at the rungs that each earlier plan reached.
        worst: Share of them that a plan has to leave behind, in [0, 1).
    """

    earlier: tuple[tuple[float, ...], ...]
    worst: float

    def goes_on(self, own: Sequence[float]) -> bool:
        """Whether a plan is trained on from the rung where it is.

        Args:
            own: Its accuracies at the rungs so far.
        """
        at = len(own) - 1
        there = [rungs[at] for rungs in self.earlier if len(rungs) > at]
        return len(there) < LEAST or own[at] >= float(np.quantile(there, self.worst))

    def measure(self, evaluator: Evaluator, plan: Plan) -> tuple[Measurement, dict[str, float]]:
        """A plan's measurement, as far as it was trained, and its term of the reward.

        The term is minus the number of rungs that it did not reach. An accuracy is at most 1, so that a plan never
        beats one that went further, whatever the two accuracies are.

        Args:
            evaluator: Its judge trains.
            plan: The plan.

        Raises:
            ValueError: The evaluator's judge does not train.
        """
        judge = evaluator.judge
        if not isinstance(judge, ShortTraining):
            raise ValueError("a race needs the reward 'short-training': nothing else can be stopped")

        def raced(network: nn.Module, plan: Plan) -> Worth:
            return judge.raced(network, self.goes_on)

        measured = evaluator.judged(plan, raced)
        return measured, {STOPPED: float(len(measured.rungs) - len(judge.rungs))}
