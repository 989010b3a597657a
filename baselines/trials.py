"""A search as far as it has come: the plans it was told about, and the one it asks for next.

    while (counts := search.ask()) is not None:
        search = search.tell(counts, value_of(counts))
    search.best.counts

Nothing is evaluated in here. What a search will ask next is a pure function of its seed and of what it was told, so
the list of trials (integers and floats, ready for JSON) is all of its state: tell a new search the same trials, and
it goes on where the other one stopped.

A search never asks for the same plan twice, so its evaluations are networks really measured, as an agent's are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float

from baselines.allocate import Choices, Counts
from baselines.method import Method

EVALUATIONS = 100
"""Networks that a search measures, unless it is told otherwise."""
REDRAWS, WIDER = 32, 1.1
"""Attempts at a plan that was not measured yet, each with wider draws than the one before; then the search ends."""

Value = tuple[float, float]
Shares = Float[np.ndarray, "*trial group"]


@dataclass(frozen=True)
class Trial:
    """A plan that was measured.

    Attributes:
        counts: Channels kept in each group to decide.
        value: Reward, and minus the loss to tell equals apart; higher is better.
    """

    counts: tuple[int, ...]
    value: Value


@dataclass(frozen=True)
class Optimiser:
    """How a search looks for plans.

    Attributes:
        name: Its name in `OPTIMISERS`.
        paper: Where it comes from, one line.
        propose: (search, generator, width) -> counts to measure next; its draws are the wider, the larger the width.
        known: Whose plans are measured first; the first of them is uniform.
    """

    name: str
    paper: str
    propose: Callable[[Search, np.random.Generator, float], Counts]
    known: tuple[Method, ...]


@dataclass(frozen=True, eq=False)
class Search:
    """A search as far as it has come.

    Attributes:
        choices: What may be chosen, and the budget.
        optimiser: How it looks.
        known: Name -> counts of the plans to begin with, each different from the others.
        evaluations: Networks to measure in all.
        seed: Seed of all that is drawn.
        trials: What it was told, in order.
    """

    choices: Choices
    optimiser: Optimiser
    known: Mapping[str, tuple[int, ...]]
    evaluations: int = EVALUATIONS
    seed: int = 0
    trials: tuple[Trial, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_evaluations(self.evaluations)

    def ask(self) -> Counts | None:
        """The plan to measure next; None when all evaluations are spent, or where no other plan is found."""
        if len(self.trials) >= self.evaluations:
            return None
        for counts in self.known.values():
            if counts not in self.measured:
                return np.array(counts, dtype=np.int64)
        # a generator of its own for each question: what one draws does not move the others
        rng = np.random.default_rng([self.seed, len(self.trials)])
        for attempt in range(REDRAWS):
            counts = self.optimiser.propose(self, rng, WIDER**attempt)
            if plain(counts) not in self.measured:
                return counts
        return None

    def tell(self, counts: Counts, value: Value) -> Search:
        """The search that knows what a plan is worth.

        Raises:
            ValueError: The plan is none that may be chosen, or was told before.
        """
        asked = plain(counts)
        allowed = len(asked) == len(self.choices.levels) and np.array_equal(
            self.choices.at(np.minimum(self.choices.rungs(counts), self.choices.heights)), counts
        )
        if not allowed:
            raise ValueError(f"counts are {asked}; one of the allowed counts of each group is allowed")
        if asked in self.measured:
            raise ValueError(f"counts are {asked}, which were measured before; a plan is evaluated once")
        return replace(self, trials=(*self.trials, Trial(asked, value)))

    def source(self, counts: Counts) -> str:
        """Where a plan comes from: the name of a known one, or the optimiser's."""
        names = {plan: name for name, plan in self.known.items()}
        return names.get(plain(counts), self.optimiser.name)

    @property
    def best(self) -> Trial:
        """The best plan inside the budget; the earliest among equals.

        Raises:
            ValueError: None was measured.
        """
        if not self.ranking:
            raise ValueError("no plan inside the budget was measured yet")
        return self.trials[self.ranking[0]]

    @cached_property
    def ranking(self) -> list[int]:
        """Numbers of the trials inside the budget, best first."""
        return self.ranked(len(self.trials))

    def ranked(self, number: int) -> list[int]:
        """Of the first so many trials, those inside the budget, best first; the earlier one among equals."""
        fits = np.flatnonzero(self._fits[:number]).tolist()
        return sorted(fits, key=lambda i: self.trials[i].value, reverse=True)

    @cached_property
    def shares(self) -> Shares:
        """Shares kept in each trial."""
        return self._counts / self.choices.full

    @cached_property
    def progress(self) -> float:
        """Share of the evaluations behind the known plans that are spent."""
        begin = len(self.known)
        return (len(self.trials) - begin) / max(self.evaluations - begin - 1, 1)

    @cached_property
    def _counts(self) -> np.ndarray:
        rows = [trial.counts for trial in self.trials]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.choices.levels))

    @cached_property
    def _fits(self) -> np.ndarray:
        return np.asarray(self.choices.cost(self._counts) <= self.choices.limit)

    @cached_property
    def measured(self) -> dict[tuple[int, ...], Value]:
        """Counts -> value of every trial."""
        return {trial.counts: trial.value for trial in self.trials}


def check_evaluations(evaluations: object) -> None:
    """Refuse what is no number of evaluations.

    Raises:
        ValueError: It is not a whole number of at least 1.
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations is {evaluations!r}; a whole number of at least 1 is allowed")


def plain(counts: Counts) -> tuple[int, ...]:
    """Counts as integers of Python."""
    return tuple(counts.tolist())
