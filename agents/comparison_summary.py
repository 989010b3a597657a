"""What the records of a comparison say together: means over seeds, fronts, ranks, and which differences are claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np

from agents.comparison_methods import DENSE
from agents.comparison_store import Record
from agents.intervals import half_width

BEFORE, AFTER = "test_accuracy", "fine_tuned_test_accuracy"
"""Accuracy on the test split right after pruning, and after the fine-tuning that all rows get."""

LEAST_SEEDS = 3
"""Seeds below which no difference is a claim."""

COSTS = ("macs", "params", "latency")
"""What a row may cost."""


@dataclass(frozen=True, eq=False)
class Summary:
    """A method on a task at a budget: its finished cells.

    Attributes:
        task: Task name.
        method: Its name.
        budget: As asked for.
        kind: Kind of the row.
        records: One a seed, by seed.
    """

    task: str
    method: str
    budget: float
    kind: str
    records: tuple[Record, ...] = field(repr=False)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that are there."""
        return tuple(record["cell"]["seed"] for record in self.records)

    def values(self, name: str) -> list[float | int]:
        """A measured value of each seed; empty if a seed has none."""
        found = [value_of(record, name) for record in self.records]
        return [value for value in found if value is not None] if None not in found else []

    def mean(self, name: str) -> float | None:
        """Mean over seeds."""
        values = self.values(name)
        return float(np.mean(values)) if values else None

    def half(self, name: str) -> float | None:
        """Half of its 95 % interval, for two seeds or more."""
        return half_width(self.values(name))

    def fact(self, name: str) -> str:
        """In which the row may differ from others: the values of its seeds, each once."""
        said = dict.fromkeys(_words(record["facts"].get(name)) for record in self.records)
        return ", ".join(word for word in said if word)

    @property
    def dynamic(self) -> bool:
        """Whether its macs are means over images."""
        return self.kind == "runtime"


def value_of(record: Record, name: str) -> float | int | None:
    """A value of a record: measured, a share of the dense network's, or a clock's.

    Static macs and the mean macs of runtime methods have different names: `macs_share` and `dynamic_macs_share`.
    """
    measured, dense, latency = record["measured"], record["dense"], record.get("latency") or {}
    if name == "macs_share":
        return measured["macs"] / dense["macs"] if "macs" in measured else None
    if name == "dynamic_macs_share":
        return measured["dynamic_macs"] / dense["macs"] if "dynamic_macs" in measured else None
    if name == "params_share":
        return measured["params"] / dense["params"]
    if name == "latency_share":
        return latency["pruned_s"] / latency["dense_s"] if latency else None
    if name == "latency_s":
        return latency.get("pruned_s")
    if name in ("find", "fine_tune"):
        return (record.get("cpu_seconds") or {}).get(name)
    if name == "evaluations":
        return record["facts"]["evaluations"]
    return measured.get(name)


def summaries(records: Sequence[Record]) -> list[Summary]:
    """Finished records by task, method and budget, in the order in which they come; failed ones are left out."""
    found: dict[tuple[str, str, float], list[Record]] = {}
    for record in records:
        if "failed" not in record:
            cell = record["cell"]
            found.setdefault((cell["task"], cell["method"], cell["budget"]), []).append(record)
    made = []
    for (task, method, budget), some in found.items():
        ordered = tuple(sorted(some, key=lambda record: record["cell"]["seed"]))
        made.append(Summary(task, method, budget, ordered[0]["kind"], ordered))
    return made


def score(row: Summary) -> str:
    """Name of the accuracy that a row is judged by: after fine-tuning where there is one, else as it is."""
    return AFTER if row.values(AFTER) else BEFORE


def front(points: Sequence[tuple[float | int, float | int]]) -> list[int]:
    """Numbers of the points that no other beats: by rising cost, each with a higher value than all cheaper ones.

    Args:
        points: (cost, value) each.
    """
    best, kept = -np.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Ranks by falling value, from 1; equals share the mean of their ranks."""
    ordered = sorted(values.values(), reverse=True)
    return {
        name: float(np.mean([i + 1 for i, other in enumerate(ordered) if other == value]))
        for name, value in values.items()
    }


def rank_table(rows: Sequence[Summary]) -> dict[str, dict[float, float]]:
    """Method -> budget -> rank by mean accuracy, among the static methods of one task; best mean rank first.

    Methods that miss a budget come last: their mean is of other games.
    """
    static = [row for row in rows if not row.dynamic and row.method != DENSE]
    budgets = list(dict.fromkeys(row.budget for row in static))
    table: dict[str, dict[float, float]] = {}
    for budget in budgets:
        means = {row.method: row.mean(score(row)) or 0.0 for row in static if row.budget == budget}
        for method, rank in ranks(means).items():
            table.setdefault(method, {})[budget] = rank
    order = sorted(table, key=lambda method: (len(budgets) - len(table[method]), np.mean(list(table[method].values()))))
    return {method: table[method] for method in order}


@dataclass(frozen=True)
class Claim:
    """A difference that holds for certain: same task, budget and evaluations, seed by seed.

    Attributes:
        budget: Of both.
        better: A method.
        worse: Another.
        mean: Mean difference of their accuracies.
        half: Half of its 95 % interval.
        seeds: Pairs.
        evaluations: Networks that each of the two measured.
    """

    budget: float
    better: str
    worse: str
    mean: float
    half: float
    seeds: int
    evaluations: int


def comparable(one: Summary, other: Summary) -> bool:
    """Whether a difference of two rows could be a claim: nothing but the method tells them apart, and enough seeds."""
    same = ("task", "budget", "dynamic")
    alike = all(getattr(one, name) == getattr(other, name) for name in same)
    facts = ("evaluations", "own_training", "epochs")
    shared = set(one.seeds) & set(other.seeds)
    return (
        alike
        and DENSE not in (one.method, other.method)
        and len(shared) >= LEAST_SEEDS
        and all(one.fact(name) == other.fact(name) for name in facts)
        and score(one) == score(other)
    )


def claims(rows: Sequence[Summary]) -> tuple[list[Claim], int]:
    """Differences whose interval excludes 0, the largest first, and how many pairs were looked at.

    Where nothing varies between seeds (methods without chance on one fixed network), seeds say nothing about what
    another network would give, and nothing is claimed.
    """
    found, looked = [], 0
    for one, other in combinations(rows, 2):
        if not comparable(one, other):
            continue
        looked += 1
        name = score(one)
        values = [dict(zip(row.seeds, row.values(name), strict=True)) for row in (one, other)]
        differences = [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]
        mean, half = float(np.mean(differences)), half_width(differences) or 0.0
        if 0 < half < abs(mean):
            better, worse = (one, other) if mean > 0 else (other, one)
            spent = int(one.records[0]["facts"]["evaluations"])
            found.append(Claim(one.budget, better.method, worse.method, abs(mean), half, len(differences), spent))
    return sorted(found, key=lambda claim: claim.mean, reverse=True), looked


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return "" if value is None else str(value)
