"""A decision problem with a known best plan: five groups of unlike worth, measured by a formula."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np

from prune_env.envs.dynamics import Problem
from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.measure import Measurement
from prune_env.pruning.plan import Plan
from tests.env.problems import chain, problem_of

CHANNELS = (8, 8, 8, 8, 8)


@dataclass(eq=False)
class Landscape:
    """Accuracy exp(-error): group i adds worth_i * (1 - keep_i)^2, and neighbours that differ cost more."""

    graph: LayerGraph
    worth: tuple[float, ...] = (0.2, 0.6, 2.0, 0.3, 1.2)
    twist: float = 0.8
    network: None = None
    moments: Curves = field(default_factory=lambda: Curves())
    evaluations: int = 0

    def value(self, counts: np.ndarray) -> np.ndarray:
        """Accuracy of channel counts `[..., groups]`."""
        keep = counts / self.graph.full
        error = (np.array(self.worth) * (1 - keep) ** 2).sum(-1)
        return np.exp(-error - self.twist * (np.diff(keep, axis=-1) ** 2).sum(-1))

    def measure(self, plan: Plan) -> Measurement:
        """The formula, with true macs and params."""
        self.evaluations += 1
        value = float(self.value(self.graph.counts(plan)))
        return Measurement(value, 1 - value, self.graph.macs(plan), self.graph.params(plan))


@dataclass(frozen=True)
class Curves:
    """Error curves that know nothing of the groups' worth, so that the known plans are not the best."""

    def error_curve(self, network: None, group: Group, *, scores: object, points: int | None = None) -> np.ndarray:
        """A straight line from 1 to 0."""
        return np.linspace(1.0, 0.0, points or group.channels + 1)


def toy(*, budget: float = 0.4) -> Problem:
    """The problem."""
    graph = chain(CHANNELS)
    problem = problem_of(graph, budget=budget)
    return replace(problem, evaluator=Landscape(graph), dense=replace(problem.dense, accuracy=1.0, loss=0.0))


def exhausted(problem: Problem) -> tuple[float, np.ndarray]:
    """The best accuracy inside the budget, by trying every plan, and all feasible values."""
    counts = np.array(list(itertools.product(*problem.allowed)))
    fits = problem.graph.cost[problem.resource](counts) <= problem.budget_of(problem.value).limit
    values = problem.evaluator.value(counts[fits])
    return float(values.max()), values
