"""Records into columns: every candidate score of the plans of one budget beside the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from benchmarks.lasting.proxies import PROXIES
from benchmarks.lasting.ranking import Spread, predicted, spread, tau
from benchmarks.lasting.scores import REPAIRS
from benchmarks.lasting.short import Short, extrapolated
from benchmarks.lasting.study import Record, Settings, records

KINDS = ("counts alone", "trainability", "instant measurement", "short training", "regression")
"""What scores are made from, roughly from cheap to dear."""

REGRESSIONS = {
    "widths": ("widths mean_keep", "widths min_keep", "widths log_widths", "widths log_params", "widths tilt"),
    "widths + errors": ("widths log_widths", "widths log_params", "widths tilt", "curves neg_sum"),
    "widths + recalibrated": ("widths log_widths", "widths log_params", "widths tilt", "recalibrated neg_loss"),
    "widths + refit": ("widths log_widths", "widths log_params", "widths tilt", "curves neg_sum", "refit neg_loss"),
    "widths + proxies": ("widths log_params", "widths tilt", "synflow score", "naswot score", "zen score"),
    "widths + 20 steps": ("widths log_widths", "widths log_params", "widths tilt", "20@0.02 neg_loss"),
    "widths + 50 steps": ("widths log_widths", "widths log_params", "widths tilt", "50@0.02 neg_loss"),
    "widths + 100 steps": ("widths log_widths", "widths log_params", "widths tilt", "100@0.05 neg_loss"),
}
"""Regressions, by the scores that they learn from. Judged on plans that they did not learn from."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A score of all plans of a budget.

    Attributes:
        name: Family and value.
        kind: One of `KINDS`.
        values: `[plan]`; higher should be better.
        cpu_s: Median CPU seconds for one plan, without what is made once for the network.
        wall_s: Median wall seconds for one plan.
        families: What had to be made for it.
    """

    name: str
    kind: str
    values: Float[np.ndarray, " plan"]
    cpu_s: float
    wall_s: float
    families: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """Everything about one budget.

    Attributes:
        budget: Share of the macs.
        plans: Names of the plans that have a truth and all scores.
        truth: `[plan]` accuracy on the truth images after fine-tuning, mean over seeds.
        test: `[plan]` the same on the test split.
        candidates: The scores that all of these plans have.
        spread: Of the truth, all fine-tuned plans of the budget.
        test_spread: The same on the test split.
    """

    budget: float
    plans: tuple[str, ...]
    truth: Float[np.ndarray, " plan"]
    test: Float[np.ndarray, " plan"]
    candidates: tuple[Candidate, ...]
    spread: Spread
    test_spread: Spread

    @property
    def tested(self) -> float:
        """Tau-b of the truth with the accuracy of the very same networks on the test split.

        What the images leave: a score of the plan before its fine-tuning can hardly be expected to do better.
        """
        return tau(self.truth, self.test)


def tables(folder: Path, settings: Settings) -> list[Table]:
    """A table for each budget of which at least three plans have a truth and scores.

    Raises:
        ValueError: No budget has; or a corrupt record.
    """
    plans = {plan["name"]: plan for plan in records(folder / "plans")}
    truths: dict[str, dict[int, Record]] = {}
    for record in records(folder / "truth"):
        truths.setdefault(record["plan"], {})[record["seed"]] = record
    scored = {record["plan"]: record["families"] for record in records(folder / "scores")}
    found = []
    for budget in settings.budgets:
        names = [name for name, plan in plans.items() if plan["budget"] == budget and 0 in truths.get(name, {})]
        # A record that is being made would leave all other plans with the few scores that it has.
        most = max((len(scored[name]) for name in names if name in scored), default=0)
        both = [name for name in names if name in scored and len(scored[name]) == most]
        if len(both) >= 3:
            spreads = [spread(*_seeds(truths, names, f"{split}_accuracy")) for split in ("truth", "test")]
            truth, test = (_means(truths, both, f"{split}_accuracy") for split in ("truth", "test"))
            steps = truths[both[0]][0]["steps"]
            candidates = _candidates([scored[name] for name in both], truth, steps=steps)
            found.append(Table(budget, tuple(both), truth, test, candidates, *spreads))
    if not found:
        raise ValueError(f"{folder} has no budget with three plans that have truth and scores; run these stages first")
    return found


def _seeds(truths: Mapping[str, Mapping[int, Record]], names: Sequence[str], field: str) -> Iterator[dict[str, float]]:
    """Plan -> accuracy from the first seed, and from the second, of those plans that have one."""
    for seed in (0, 1):
        yield {name: truths[name][seed][field] for name in names if seed in truths[name]}


def _means(truths: Mapping[str, Mapping[int, Record]], names: Sequence[str], field: str) -> Float[np.ndarray, " plan"]:
    return np.array([np.mean([one[field] for one in truths[name].values()]) for name in names])


def _candidates(
    scored: Sequence[Mapping[str, Record]], truth: Float[np.ndarray, " plan"], *, steps: int
) -> tuple[Candidate, ...]:
    common = [family for family in scored[0] if all(family in one for one in scored)]
    plain = [
        Candidate(
            f"{family} {value}",
            kind_of(family),
            np.array([one[family]["values"][value] for one in scored]),
            *_costs(scored, (family,)),
            (family,),
        )
        for family in common
        for value in scored[0][family]["values"]
    ]
    known = {one.name: one for one in plain if np.isfinite(one.values).all()}
    grown = {one.name: one for one in _extrapolations(scored, common, steps=steps)}
    return (*known.values(), *grown.values(), *_regressions(scored, known, truth))


def kind_of(family: str) -> str:
    """The kind of a family of scores."""
    if family in ("widths", "curves"):
        return "counts alone"
    if family in PROXIES:
        return "trainability"
    return "instant measurement" if family in REPAIRS else "short training"


def _costs(scored: Sequence[Mapping[str, Record]], families: tuple[str, ...]) -> tuple[float, float]:
    """Median CPU and wall seconds that some families take together."""
    cpu, wall = (
        float(np.median([sum(one[family][clock] for family in families) for one in scored]))
        for clock in ("cpu_s", "wall_s")
    )
    return cpu, wall


def _extrapolations(scored: Sequence[Mapping[str, Record]], common: Sequence[str], *, steps: int) -> list[Candidate]:
    """Slope and promise of the errors after the short trainings of one peak learning rate, where there are several."""
    rates: dict[float, list[Short]] = {}
    for family in common:
        if kind_of(family) == "short training" and " of " not in family:
            short = Short.parse(family)
            rates.setdefault(short.lr, []).append(short)
    found = []
    for lr, some in rates.items():
        shorts = sorted(some)
        for upto in range(2, len(shorts) + 1):
            used = tuple(short.name for short in shorts[:upto])
            curves = [{s.steps: 1 - one[s.name]["values"]["accuracy"] for s in shorts[:upto]} for one in scored]
            fits = [extrapolated(curve, at=steps) for curve in curves]
            name = f"{'+'.join(str(s.steps) for s in shorts[:upto])}@{lr:g}"
            for value in fits[0]:
                values = np.array([fit[value] for fit in fits])
                found.append(Candidate(f"{name} {value}", "short training", values, *_costs(scored, used), used))
    return found


def _regressions(
    scored: Sequence[Mapping[str, Record]], known: Mapping[str, Candidate], truth: Float[np.ndarray, " plan"]
) -> list[Candidate]:
    found = []
    for name, columns in REGRESSIONS.items():
        if not all(column in known for column in columns):
            continue
        used = tuple(dict.fromkeys(family for column in columns for family in known[column].families))
        values = predicted(np.stack([known[column].values for column in columns], axis=1), truth)
        found.append(Candidate(f"regression: {name}", "regression", values, *_costs(scored, used), used))
    return found
