"""The configuration of a search baseline's run: an agent's, save for what only learners have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tyro.conf import Suppress, arg

from agents.config import TrainConfig, unknown
from baselines.search import OPTIMISERS


@dataclass(frozen=True)
class SearchConfig(TrainConfig):
    """Search per-group keep ratios for one network at one budget, without learning.

    Raises:
        ValueError: A value that is not allowed; names the field, the value and what is.
    """

    program: ClassVar[str] = "agents.search_baselines"

    algorithm: Annotated[str, arg(name="method")] = "cem"
    """Who searches: random_search, cem, evolution, annealing or netadapt."""
    episodes: Annotated[int, arg(name="evaluations")] = 100
    """Networks that are cut and measured."""
    hard_budget: Suppress[bool] = True
    """Always kept."""
    shape: Suppress[str | None] = None
    """Not of a search, which learns nothing on the way."""
    warm_up: Suppress[int | None] = None
    """Not of a search."""
    workers: Suppress[int] = 1
    """Not of a search."""
    chunk: Suppress[int] = 1
    """Not of a search: every evaluation is a checkpoint."""
    seed: int = 0
    """Seed of the splits, of a dense training, and of the search."""
    seeds: Suppress[tuple[int, ...]] = ()
    """Not of a search: one run at a time."""

    def check_algorithm(self) -> None:
        """Refuse a method that does not search.

        Raises:
            ValueError: Names the closest.
        """
        if self.algorithm not in OPTIMISERS:
            raise ValueError(unknown("method", self.algorithm, OPTIMISERS))


def config_of(text: str) -> TrainConfig:
    """The config of a run, of whichever kind it is.

    Raises:
        ValueError: Not JSON, unknown fields, or values that are not allowed.
    """
    record = json.loads(text)
    searched = isinstance(record, dict) and record.get("algorithm") in OPTIMISERS
    return (SearchConfig if searched else TrainConfig).from_json(text)
