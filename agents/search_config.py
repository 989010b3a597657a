"""The configuration of a search baseline's run: an agent's, save for what only learners have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tyro.conf import Suppress, arg

from agents.config import TrainConfig
from baselines.race import RACERS
from baselines.search import OPTIMISERS
from prune_env.checks import check_name


@dataclass(frozen=True)
class SearchConfig(TrainConfig):
    """Search per-group keep ratios for one network at one budget, without learning.

    Raises:
        ValueError: A value that is not allowed; names the field, the value and what is.
    """

    program: ClassVar[str] = "agents.search_baselines"

    algorithm: Annotated[str, arg(name="method")] = "cem"
    """Who searches: random_search, cem, evolution, annealing, netadapt or bayesian."""
    episodes: Annotated[int, arg(name="evaluations")] = 100
    """Networks that are cut and measured."""
    hard_budget: Suppress[bool] = True
    """Always kept."""
    shape: Suppress[str | None] = None
    """Not of a search, which learns nothing on the way."""
    warm_up: Suppress[int | None] = None
    """Not of a search."""
    random_plans: Suppress[int | None] = None
    """Not of a search: `random_search` is one."""
    workers: Suppress[int] = 1
    """Not of a search."""
    chunk: Suppress[int] = 1
    """Not of a search: every evaluation is a checkpoint."""
    stop_worst: float = 0.0
    """A short training goes on from a quarter, and from a half, of its steps only with an accuracy that this share of
    the earlier plans did not reach there (the median: .5); 0 trains all to the end."""
    seed: int = 0
    """Seed of the splits, of a dense training, and of the search."""
    seeds: Suppress[tuple[int, ...]] = ()
    """Not of a search: one run at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stop_worst < 1:
            raise ValueError(f"stop_worst is {self.stop_worst!r}; a share from 0 below 1 is allowed")
        if self.stop_worst and (self.env().measure != "short-training" or self.algorithm not in RACERS):
            raise ValueError(
                f"stop_worst is {self.stop_worst!r} with reward {self.reward!r} and method {self.algorithm!r}; "
                f"above 0 it is allowed with reward 'short-training' and one of {', '.join(RACERS)}"
            )

    @property
    def paid(self) -> str:
        """How episodes are measured, as a part of the name."""
        return super().paid + (f"-stop{self.stop_worst:g}" if self.stop_worst else "")

    def check_algorithm(self) -> None:
        """Refuse a method that does not search.

        Raises:
            ValueError: Names the closest.
        """
        check_name("method", self.algorithm, OPTIMISERS)


def config_of(text: str) -> TrainConfig:
    """The config of a run, of whichever kind it is.

    Raises:
        ValueError: Not JSON, unknown fields, or values that are not allowed.
    """
    record = json.loads(text)
    searched = isinstance(record, dict) and record.get("algorithm") in OPTIMISERS
    return (SearchConfig if searched else TrainConfig).from_json(text)
