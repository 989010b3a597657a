"""All budgets together: which score ranks plans best on average, and whether short training is worth its price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from benchmarks.lasting.candidates import KINDS, Table
from benchmarks.lasting.ranking import Estimate, draws, estimate, tau, tau_samples


@dataclass(frozen=True, eq=False)
class Overall:
    """A score at all budgets.

    Attributes:
        name: Family and value.
        kind: One of `KINDS`.
        cpu_s: CPU seconds a plan, mean over budgets.
        taus: `[budget]` Kendall's tau-b with the truth.
        samples: `[draw]` mean tau-b over budgets when the plans of each budget are resampled; the draws are the same
            for all scores.
    """

    name: str
    kind: str
    cpu_s: float
    taus: tuple[float, ...]
    samples: Float[np.ndarray, " draw"]

    @property
    def mean(self) -> Estimate:
        """Mean tau-b over budgets, with its interval."""
        return estimate(float(np.mean(self.taus)), self.samples)

    def over(self, other: Overall) -> Estimate:
        """Mean tau-b above another score's, with the interval of the difference on the same resampled plans."""
        return estimate(float(np.mean(self.taus) - np.mean(other.taus)), self.samples - other.samples)


def overall(found: Sequence[Table]) -> list[Overall]:
    """The scores that all budgets have, best mean tau first.

    Args:
        found: Budgets; their plans are different, so they are resampled apart.
    """
    weights = [draws(len(table.plans), seed=number) for number, table in enumerate(found)]
    columns = [{one.name: one for one in table.candidates} for table in found]
    rows = []
    for name, first in columns[0].items():
        if all(name in column for column in columns):
            pairs = [(column[name].values, table.truth) for column, table in zip(columns, found, strict=True)]
            samples = [tau_samples(*pair, some) for pair, some in zip(pairs, weights, strict=True)]
            cpu_s = float(np.mean([column[name].cpu_s for column in columns]))
            rows.append(Overall(name, first.kind, cpu_s, tuple(tau(*p) for p in pairs), np.mean(samples, axis=0)))
    return sorted(rows, key=lambda row: -row.mean.value)


def best(rows: Sequence[Overall], kind: str) -> Overall | None:
    """The best row of a kind, if there is one."""
    return next((row for row in rows if row.kind == kind), None)


def headline(rows: Sequence[Overall]) -> str:
    """The takeaway in one sentence, from the numbers."""
    short, instant = best(rows, "short training"), best(rows, "instant measurement")
    if short is None or instant is None:
        return f"{rows[0].name} ranks plans best (mean tau-b {rows[0].mean.value:.2f})"
    gain = short.over(instant)
    verb = "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "no better than"
    said = " and ".join(f"{row.mean.value:.2f} ({row.name}, {row.cpu_s:.2g} s)" for row in (short, instant))
    return f"short training foresees fine-tuning {verb} measuring at once\nmean tau-b over budgets: {said}"


def section(found: Sequence[Table], rows: Sequence[Overall], *, shown: int) -> str:
    """All budgets in Markdown.

    Args:
        found: Budgets.
        rows: Their scores, best first.
        shown: Rows of each kind.
    """
    heads = ("score", "made from", "CPU s a plan", *(f"tau-b at {table.budget:g}" for table in found), "mean")
    picked = [row for kind in KINDS for row in [r for r in rows if r.kind == kind][:shown]]
    lines = [
        "### All budgets",
        "",
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
        *(
            f"| {row.name} | {row.kind} | {row.cpu_s:.3g} | {' | '.join(f'{t:.2f}' for t in row.taus)} "
            f"| {row.mean.text()} |"
            for row in rows
            if row in picked
        ),
        f"| the fine-tuned networks on the test split | | | {' | '.join(f'{t.tested:.2f}' for t in found)} "
        f"| {np.mean([table.tested for table in found]):.2f} |",
        "",
        f"{' + '.join(str(len(table.plans)) for table in found)} plans; the best {shown} of each kind, best first, of "
        f"{len(rows)} scores. Intervals: 95 %, the plans of each budget resampled.",
    ]
    short, instant = best(rows, "short training"), best(rows, "instant measurement")
    if short is not None and instant is not None:
        lines[-1] += f" `{short.name}` above `{instant.name}`, on the same plans: {short.over(instant).text()}."
    return "\n".join(lines)
