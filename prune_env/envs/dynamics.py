"""The decision process behind channel pruning: what is constant, where an episode is, what may be done next.

Pure functions over frozen values; no gymnasium and no network in sight. A state is its own fork: keep it, and go on
from it as often as you like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, runtime_checkable

import numpy as np
from typing_extensions import TypeVar

from prune_env.pruning.evaluator import Evaluator
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import Budget, Measurement
from prune_env.pruning.plan import Plan


@runtime_checkable
class Measures(Protocol):
    """Turns a plan into a measured network; `prune_env.pruning.evaluator.Evaluator` is one."""

    def measure(self, plan: Plan) -> Measurement:
        """What the pruned network is worth."""
        ...


M = TypeVar("M", bound=Measures, default=Evaluator)


@dataclass(frozen=True, eq=False)
class Problem(Generic[M]):
    """Everything that stays the same from episode to episode.

    Attributes:
        name: What is pruned, for titles.
        graph: Its layer graph.
        resource: What the budget bounds, `macs` or `params`.
        steps: The groups that are decided (positions in `graph.groups`), in forward order. Groups that are left alone
            or have only one allowed count are kept whole and are not steps.
        allowed: Per step, the counts that may be kept, rising; the last is the whole group.
        dense: The whole network, measured on the search split.
        scores: Group name -> static importance of each channel; which channels a count keeps.
        fields: Observation field -> `[steps + 1, width]` float32, what is known of each step before the episode.
        evaluator: Measures a finished plan on the search split. The decisions need no more of it than that; methods
            and reports read an `Evaluator`'s network, data and moments as well.
        reward: (dense, pruned, budget) -> named terms, summed by the env.
        value: The default budget, a share or an absolute number.
        span: Lowest and highest share when the budget is drawn per episode, else None.
        hard: True moves actions so that every episode ends inside the budget; False leaves the budget to the reward.

    Raises:
        ValueError: Nothing to decide, or a budget that cannot be reached.
    """

    name: str
    graph: LayerGraph
    resource: str
    steps: tuple[int, ...]
    allowed: tuple[np.ndarray, ...]
    dense: Measurement
    scores: Mapping[str, np.ndarray]
    fields: Mapping[str, np.ndarray]
    evaluator: M
    reward: Callable[[Measurement, Measurement, Budget], Mapping[str, float]]
    value: int | float = 0.5
    span: tuple[int | float, int | float] | None = None
    hard: bool = True

    def __post_init__(self) -> None:
        values = (self.value, *(self.span or ()))
        check_budgets(self.graph, self.steps, self.allowed, resource=self.resource, values=values)

    @cached_property
    def total(self) -> int:
        """What the whole network uses of the budget's resource."""
        return int(self.graph.cost[self.resource](self.graph.full))

    @cached_property
    def minimum(self) -> int:
        """The least of the resource that any plan can use."""
        return int(self.graph.cost[self.resource](self._rows[-1]))

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Channels of the group of each step."""
        return tuple(self.graph.groups[group].channels for group in self.steps)

    @cached_property
    def _rows(self) -> np.ndarray:
        """Channel counts with every step still open: `[5, groups]`, open groups at none, all, and thrice at least."""
        rows = np.tile(self.graph.full, (5, 1))
        rows[0, list(self.steps)] = 0
        rows[2:, list(self.steps)] = [counts[0] for counts in self.allowed]
        return rows

    def budget_of(self, value: int | float | Budget) -> Budget:
        """A share in (0, 1] or an absolute number as a budget.

        Raises:
            ValueError: Not a budget, or one that no plan can keep; says the reachable minimum.
        """
        if isinstance(value, Budget):
            if value.resource != self.resource or value.limit < self.minimum:
                raise ValueError(f"budget {value} does not fit; {self.resource} of at least {self.minimum} are allowed")
            return value
        return Budget.of(_plain(value), resource=self.resource, dense=float(self.total), minimum=float(self.minimum))


@dataclass(frozen=True)
class State:
    """Where an episode is.

    Attributes:
        budget: The episode's budget.
        kept: Channels kept in each step decided so far.
    """

    budget: Budget
    kept: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """Steps decided so far, and the index of the step to decide next."""
        return len(self.kept)


@dataclass(frozen=True, eq=False)
class Outlook:
    """What a state still allows, in numbers of the budget's resource.

    `spent + forced + left` is the budget's limit; `left` is negative only where the budget is not hard.

    Attributes:
        feasible: Counts that the next step may keep, rising; empty at the end.
        spent: Used by the decided groups (and by layers that are never pruned) among themselves.
        forced: What the open groups add at their minimum.
        left: The limit without both.
        rest: What the open groups add when kept whole.
        price: What the next group adds when kept whole instead of at its minimum.
    """

    feasible: np.ndarray
    spent: float
    forced: float
    left: float
    rest: float
    price: float


def allowed_counts(channels: int, *, min_channels: int = 1, min_keep: int | float = 0, round_to: int = 1) -> np.ndarray:
    """Counts that a group may keep: multiples of `round_to` from a minimum on, and always all channels.

    Args:
        channels: Of the group.
        min_channels: Fewest channels.
        min_keep: Least share of the channels.
        round_to: What counts are multiples of.

    Returns:
        `[counts]` int64, rising, never empty, never 0.
    """
    # .7 * 10 is a little less than 7, and .1 * 3 * 10 a little more than 3
    least = max(min_channels, 1, math.ceil(min_keep * channels - 1e-9))
    first = math.ceil(least / round_to) * round_to
    return np.array([*range(first, channels, round_to), channels], dtype=np.int64)


def open_steps(
    graph: LayerGraph,
    *,
    min_channels: int = 1,
    min_keep: int | float = 0,
    round_to: int = 1,
    leave: Iterable[str] = (),
) -> tuple[tuple[int, ...], tuple[np.ndarray, ...]]:
    """The groups to decide and the counts that each may keep.

    Args:
        graph: The network's graph.
        min_channels: Fewest channels a group may keep (smaller groups are kept whole).
        min_keep: Least share of its channels that a group may keep.
        round_to: Kept counts are multiples of it, or the whole group.
        leave: Groups to keep whole: group names, or names of any layer that writes the group.

    Returns:
        Positions in `graph.groups`, and per position its allowed counts.

    Raises:
        ValueError: A name in `leave` that is no group.
    """
    left: set[int] = set()
    for name in leave:
        named = {i for i, group in enumerate(graph.groups) if any(slot.module == name for slot in group.producers)}
        left |= named or {graph.position(name)}
    options = {
        i: allowed_counts(group.channels, min_channels=min_channels, min_keep=min_keep, round_to=round_to)
        for i, group in enumerate(graph.groups)
        if i not in left
    }
    options = {i: counts for i, counts in options.items() if len(counts) > 1}
    return tuple(options), tuple(options.values())


def check_budgets(
    graph: LayerGraph,
    steps: tuple[int, ...],
    allowed: tuple[np.ndarray, ...],
    *,
    resource: str,
    values: Iterable[int | float],
) -> None:
    """Refuse a problem that leaves nothing to decide, or budgets that no plan can keep.

    Raises:
        ValueError: Says the reachable minimum.
    """
    if not steps:
        raise ValueError("there is no group to decide: every group is left whole or has only one allowed count")
    least = graph.full.copy()
    least[list(steps)] = [counts[0] for counts in allowed]
    dense, minimum = (float(graph.cost[resource](counts)) for counts in (graph.full, least))
    for value in values:
        Budget.of(_plain(value), resource=resource, dense=dense, minimum=minimum)


def _plain(value: Any) -> Any:
    """A number of any kind as Python's float; anything else is handed on, to be refused by name."""
    return float(value) if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) else value


def start(problem: Problem, budget: int | float | Budget | None = None) -> State:
    """The beginning of an episode; without a budget, at the problem's own."""
    return State(problem.budget_of(problem.value if budget is None else budget))


def finished(problem: Problem, state: State) -> bool:
    """Whether every step is decided."""
    return state.position == len(problem.steps)


def outlook(problem: Problem, state: State) -> Outlook:
    """What a state still allows, by integer-exact arithmetic on channel counts.

    As a function of one group's count the cost is a polynomial of degree two at most (a residual group is both input
    and output of a layer), so its values at 0, 1 and 2 give it at every count.
    """
    at = state.position
    rows = problem._rows.copy()
    rows[:, list(problem.steps[:at])] = state.kept
    over = at == len(problem.steps)
    if not over:
        rows[2:, problem.steps[at]] = (0, 1, 2)
    spent, whole, zero, one, two = problem.graph.cost[problem.resource](rows).tolist()
    limit = state.budget.limit
    if over:
        return Outlook(np.empty(0, np.int64), spent, 0.0, limit - spent, 0.0, 0.0)
    counts = problem.allowed[at]
    square = (two - 2 * one + zero) / 2
    costs = zero + counts * (one - zero - square + square * counts)
    feasible = counts[: int(np.searchsorted(costs, limit, side="right"))] if problem.hard else counts
    least = float(costs[0])
    return Outlook(feasible, spent, least - spent, limit - least, whole - spent, float(costs[-1]) - least)


def feasible(problem: Problem, state: State) -> tuple[int, int]:
    """Fewest and most channels that the next step may keep; `(0, 0)` at the end."""
    counts = outlook(problem, state).feasible
    return (int(counts[0]), int(counts[-1])) if len(counts) else (0, 0)


def nearest(counts: np.ndarray, wanted: int | float) -> int:
    """The count nearest to a wanted one; the smaller of two equally near."""
    return int(counts[np.abs(counts - wanted).argmin()])


def apply(problem: Problem, state: State, keep: int | float) -> State:
    """Keep about this share of the next group's channels: the nearest count that is allowed and affordable.

    Raises:
        ValueError: The episode is over, or the share is not a number.
    """
    if finished(problem, state):
        raise ValueError(f"all {len(problem.steps)} steps are decided; start a new episode")
    if not math.isfinite(keep):
        raise ValueError(f"keep is {keep}; a finite share of the channels is allowed")
    count = nearest(outlook(problem, state).feasible, keep * problem.channels[state.position])
    return State(state.budget, (*state.kept, count))


def counts(problem: Problem, state: State) -> np.ndarray:
    """Channels kept per group so far, int64 `[groups]`; open groups are whole."""
    kept = problem.graph.full.copy()
    kept[list(problem.steps[: state.position])] = state.kept
    return kept


def plan(problem: Problem, state: State) -> Plan:
    """The plan so far: in each group the channels of highest static importance; open groups are whole."""
    return Plan.of_counts(problem.graph, counts(problem, state), problem.scores)
