"""A method is its choice at four stages: prepare, importance, allocate, repair.

    prepare      task -> task              what is trained into the network before it is cut (a regulariser)
    importance   case -> scores            which channels of a group go first
    allocate     case -> counts            how many channels each group keeps
    repair       case, plan -> network     what the cut network is given back (merging, refit, statistics)

A stage that a paper does not touch keeps its default, so a paper's `Method(...)` is its summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import nn

from baselines.allocate import Choices, Counts, uniform
from prune_env.envs.dynamics import Problem
from prune_env.number_format import number_format
from prune_env.pruning.measure import Budget, Measurement, Meter
from prune_env.pruning.plan import Plan
from prune_env.tasks.task import Task
from prune_env.tasks.training.loop import Progress

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    """What the stages after `prepare` see.

    Attributes:
        problem: The decision problem of the env: graph, scores, error curves, evaluator (search split only).
        choices: Counts that the groups to decide may keep, and the budget. Groups are numbered as `problem.steps`.
        scores: Group name -> importance of each channel, from the method's importance stage.
        seed: Seed of all that is drawn.
        task: The prepared task; None inside a policy, which has only the problem. `allocate` does without.
    """

    problem: Problem
    choices: Choices
    scores: Scores
    seed: int = 0
    task: Task | None = None


def unprepared(task: Task, seed: int, progress: Progress | None) -> Task:
    """The network as it is."""
    return task


def given_scores(case: Case) -> Scores:
    """The importance that the user named."""
    return case.problem.scores


def same_share(case: Case) -> Counts:
    """The same share in every group."""
    return uniform(case.choices)


def no_epochs(task: Task) -> int:
    """Nothing is trained."""
    return 0


def given_repair(case: Case, plan: Plan) -> nn.Module:
    """Cut, then refit and recalibrate as the user asked: exactly what the env does."""
    return case.problem.evaluator.realise(plan)


@dataclass(frozen=True)
class Method:
    """A published method or a heuristic.

    Attributes:
        name: Its name in `METHODS`.
        paper: Where it comes from, one line.
        prepare: (task, seed, progress) -> task with a network trained for pruning; see `prepared_task`.
        importance: Case (its scores are still the problem's) -> group name -> scores.
        allocate: Case -> channels per group to decide, inside the budget.
        repair: (case, plan) -> the pruned network, ready to be measured.
        epochs: Task -> passes over its training split that `prepare` and importance train for, as long as they are new.
    """

    name: str
    paper: str
    prepare: Callable[[Task, int, Progress | None], Task] = field(default=unprepared)
    importance: Callable[[Case], Scores] = field(default=given_scores)
    allocate: Callable[[Case], Counts] = field(default=same_share)
    repair: Callable[[Case, Plan], nn.Module] = field(default=given_repair)
    epochs: Callable[[Task], int] = field(default=no_epochs)


def choices_of(problem: Problem, budget: Budget) -> Choices:
    """What an allocator may choose from in this problem, inside a budget.

    Args:
        problem: Its steps and their allowed counts are the groups and levels.
        budget: In the problem's resource.
    """
    steps, full, cost = list(problem.steps), problem.graph.full, problem.graph.cost[budget.resource]

    def spent(counts: np.ndarray) -> np.ndarray:
        rows = np.broadcast_to(full, (*np.shape(counts)[:-1], len(full))).copy()
        rows[..., steps] = counts
        return np.asarray(cost(rows))

    return Choices(problem.allowed, spent, budget.limit)


def case_of(
    method: Method,
    problem: Problem,
    *,
    budget: float | int | Budget | None = None,
    seed: int = 0,
    task: Task | None = None,
) -> Case:
    """A problem at a budget, with the method's scores.

    Args:
        method: Whose importance stage is run.
        problem: The decision problem.
        budget: A share or an absolute number; None is the problem's own.
        seed: Seed of all that is drawn.
        task: The prepared task, for importances that need data.
    """
    aim = problem.budget_of(problem.value if budget is None else budget)
    case = Case(problem, choices_of(problem, aim), problem.scores, seed, task)
    return replace(case, scores=method.importance(case))


def plan_of(case: Case, counts: Counts) -> Plan:
    """The plan that keeps these counts: in each group the channels of highest score."""
    full = case.problem.graph.full.copy()
    full[list(case.problem.steps)] = counts
    return Plan.of_counts(case.problem.graph, full, case.scores)


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned network and what it is worth.

    Attributes:
        method: Name of the method.
        network: The pruned network, repaired, in eval mode.
        plan: What was kept.
        counts: Channels kept per group.
        search: Measured on the search split.
        problem: What was decided, with the evaluator that counts the networks it measured on the way.
    """

    method: str
    network: nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    counts: Mapping[str, int]
    search: Measurement
    problem: Problem = field(repr=False)
    _task: Task = field(repr=False)

    @cached_property
    def test(self) -> Measurement:
        """Measured on the test split: read on first access, once."""
        images, labels = self._task.test.take(len(self._task.test))
        device = next(self.network.parameters()).device
        meter = Meter(images, labels, dtype=number_format(self.network, images), device=str(device))
        accuracy, loss = meter.accuracy_and_loss(self.network)
        return replace(self.search, accuracy=accuracy, loss=loss)


def run(method: Method, problem: Problem, *, task: Task, keep: float | int | None = None, seed: int = 0) -> Result:
    """The stages after `prepare`, in order, at the problem's own budget.

    Args:
        method: Whose stages.
        problem: The decision problem of the prepared task.
        task: The prepared task.
        keep: The same share in every group, in place of the allocate stage.
        seed: Seed of all that is drawn.
    """
    case = case_of(method, problem, seed=seed, task=task)
    plan = plan_of(case, method.allocate(case) if keep is None else case.choices.nearest(keep))
    network = method.repair(case, plan)
    accuracy, loss = problem.evaluator.meter.accuracy_and_loss(network)
    graph = problem.graph
    kept = {group.name: len(plan.keep[group.name]) for group in graph.groups}
    search = Measurement(accuracy, loss, graph.macs(plan), graph.params(plan))
    return Result(method.name, network, plan, kept, search, problem, task)
