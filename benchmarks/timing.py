"""Times and plans that the benchmarks share. What is compared takes turns, so that a busy machine slows both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from baselines.allocate import Choices, uniform
from prune_env.envs.dynamics import allowed_counts
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.plan import Plan


def take_turns(rounds: int, candidates: Mapping[str, Callable[[int], object]]) -> dict[str, np.ndarray]:
    """Seconds of each candidate in each round, after one round to warm up.

    Args:
        rounds: Rounds to time.
        candidates: Name -> function of the round.

    Returns:
        Name -> `[rounds]` seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            begin = perf_counter()
            candidate(turn)
            seconds[name].append(perf_counter() - begin)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def random_scores(graph: LayerGraph, seed: int) -> dict[str, np.ndarray]:
    """A random score per channel."""
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.channels) for group in graph.groups}


def uniform_counts(graph: LayerGraph, share: float) -> np.ndarray:
    """Channels per group, the same share in each, that just fit a share of the macs."""
    levels = tuple(allowed_counts(channels) for channels in graph.full.tolist())
    cost = graph.cost["macs"]
    return uniform(Choices(levels, cost, share * float(cost(graph.full))))


def uniform_plan(graph: LayerGraph, share: float) -> Plan:
    """Random channels, the same share in each group, that just fit a share of the macs."""
    return Plan.of_counts(graph, uniform_counts(graph, share), random_scores(graph, 0))


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=120)
    console.print(f"\n{title}")
    console.print(table)
