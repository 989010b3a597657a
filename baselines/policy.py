"""Methods as policies: objects with Stable-Baselines3's `predict`, for its `evaluate_policy` and for our env.

A policy is handed batches of observations and never the env, so it reads where it is, and which budget holds, from the
observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from baselines.allocate import Counts
from baselines.method import Method, case_of
from prune_env.envs.dynamics import Problem

Observation = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class CountsPolicy:
    """Keeps given numbers of channels, whatever the budget.

    Attributes:
        problem: The decision problem of the env that is played.
        counts: Channels kept in each of the problem's steps.
    """

    problem: Problem
    counts: Counts

    def predict(
        self,
        observation: Observation,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[Float32[np.ndarray, "*batch 1"], tuple[np.ndarray, ...] | None]:
        """The share that the env rounds to the planned count.

        Args:
            observation: Fields of one observation or of a batch; only `position` is read.
            state: Handed back: nothing is remembered between calls.
            episode_start: Not needed.
            deterministic: Not needed: the plan is fixed.
        """
        return _shares(self.problem, self.counts)[_steps(self.problem, observation)][..., None], state


@dataclass(frozen=True, eq=False)
class MethodPolicy:
    """A method's allocation as a policy.

    Attributes:
        method: Whose importance and allocate stages decide. The env ranks channels by the problem's own scores.
        problem: The decision problem (`env.unwrapped.problem`).
        budget: A share or an absolute number; None reads each episode's budget from the observation.
        seed: Seed of what is drawn: the same plan in every episode.
    """

    method: Method
    problem: Problem
    budget: float | int | None = None
    seed: int = 0
    _known: dict[float, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a budget that cannot be kept; the allocation waits until it is needed."""
        self.problem.budget_of(self.problem.value if self.budget is None else self.budget)

    def counts(self, share: float) -> Counts:
        """Channels per step at an observed budget (share of the dense network, as float32)."""
        if share not in self._known:
            case = case_of(self.method, self.problem, budget=self._budget(share), seed=self.seed)
            self._known[share] = self.method.allocate(case)
        return self._known[share]

    def predict(
        self,
        observation: Observation,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[Float32[np.ndarray, "*batch 1"], tuple[np.ndarray, ...] | None]:
        """The share that the env rounds to the planned count.

        Args:
            observation: Fields of one observation or of a batch; `position` and `budget` are read.
            state: Handed back: nothing is remembered between calls.
            episode_start: Not needed.
            deterministic: Not needed: a method draws by its seed only.
        """
        steps = _steps(self.problem, observation)
        budgets = np.asarray(observation["budget"])[..., 0]
        rows = [
            _shares(self.problem, self.counts(float(share)))[step]
            for share, step in zip(budgets.ravel(), steps.ravel(), strict=True)
        ]
        return np.array(rows, dtype=np.float32).reshape(*steps.shape, 1), state

    def _budget(self, share: float) -> Any:
        if self.budget is not None:
            return self.budget
        own = self.problem.budget_of(self.problem.value)
        if np.float32(own.limit / self.problem.total) == np.float32(share):
            return own
        if share * self.problem.total <= self.problem.minimum:
            return self.problem.minimum
        # Rounding to float32 moves a budget by at most 1e-7 of itself; the env itself keeps to the true one.
        return min(share, 1.0)


def _steps(problem: Problem, observation: Observation) -> Int64[np.ndarray, "*batch"]:
    """The step that each observation stands at; the end of an episode counts as its last step."""
    position = np.asarray(observation["position"], dtype=np.float64)[..., 0]
    return np.asarray(np.minimum(np.rint(position * len(problem.steps)), len(problem.steps) - 1), dtype=np.int64)


def _shares(problem: Problem, counts: Counts) -> Float32[np.ndarray, " step"]:
    """Counts as shares; float32 is exact enough for any count to be the nearest to its share."""
    return (counts / np.array(problem.channels)).astype(np.float32)
