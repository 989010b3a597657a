"""The report: what there is to win at each budget, which score sees it, and at which price."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from agents.plot import png
from benchmarks.lasting import overview
from benchmarks.lasting.candidates import KINDS, Candidate, Table, tables
from benchmarks.lasting.picture import figure
from benchmarks.lasting.ranking import Estimate, Spread, draws, regret_estimate, tau_estimate
from benchmarks.lasting.study import Settings
from prune_env.files import write

TOP = 5
"""Plans of which the best is looked at for the regret of a short list."""
UNIFORM = "uniform-l1-none"
"""How the name of the plan ends that the others are compared with."""
SHOWN = 2
"""Rows of each kind in the Markdown table, besides those that nothing cheaper beats; the CSV file has all."""
HEADS = ("score", "made from", "CPU s a plan", "tau-b", "regret of the best, points", f"of the best {TOP}, points")


@dataclass(frozen=True, eq=False)
class Judged:
    """A candidate and how well it ranks.

    Attributes:
        candidate: The score.
        tau: Kendall's tau-b with the truth.
        first: Regret of its best plan, in accuracy.
        short_list: Regret of its best `TOP` plans.
    """

    candidate: Candidate
    tau: Estimate
    first: Estimate
    short_list: Estimate


def judged(table: Table) -> list[Judged]:
    """All candidates of a budget, best tau first."""
    weights = draws(len(table.plans))
    found = [
        Judged(
            one,
            tau_estimate(one.values, table.truth, weights),
            regret_estimate(one.values, table.truth, weights, top=1),
            regret_estimate(one.values, table.truth, weights, top=TOP),
        )
        for one in table.candidates
    ]
    return sorted(found, key=lambda row: -row.tau.value)


def frontier(rows: Sequence[Judged]) -> list[Judged]:
    """The rows that nothing as cheap beats, from cheap to dear."""
    found: list[Judged] = []
    for row in sorted(rows, key=lambda row: (row.candidate.cpu_s, -row.tau.value)):
        if not found or row.tau.value > found[-1].tau.value:
            found.append(row)
    return found


def write_report(folder: Path, settings: Settings) -> str:
    """Write `report.md`, `scores.csv` and `lasting.png`; the Markdown is handed back.

    Raises:
        ValueError: There is too little to report.
        OSError: They cannot be written.
    """
    found = {table.budget: table for table in tables(folder, settings)}
    rows = {budget: judged(table) for budget, table in found.items()}
    together = overview.overall(list(found.values()))
    sections = [section(settings, table, rows[budget]) for budget, table in found.items()]
    text = "\n\n".join([*sections, overview.section(list(found.values()), together, shown=SHOWN)]) + "\n"
    taus = {budget: [(r.candidate, r.tau) for r in some] for budget, some in rows.items()}
    fronts = {budget: [row.candidate.name for row in frontier(some)] for budget, some in rows.items()}
    ceilings = {budget: table.spread.ceiling for budget, table in found.items()}
    tests = {budget: table.tested for budget, table in found.items()}
    title = f"{settings.task}: {overview.headline(together)}"
    drawn = figure(title, taus, fronts=fronts, ceilings=ceilings, tests=tests)
    write(folder / "lasting.png", png(drawn))
    write(folder / "scores.csv", _csv(rows))
    write(folder / "report.md", text)
    return text


def section(settings: Settings, table: Table, rows: Sequence[Judged]) -> str:
    """A budget in Markdown: what there is to win, the table, the confirmation."""
    front = {row.candidate.name for row in frontier(rows)}
    best = [row for kind in KINDS for row in [r for r in rows if r.candidate.kind == kind][:SHOWN]]
    shown = [row for row in rows if row.candidate.name in front or row in best]
    lines = [
        f"### {settings.task} at {table.budget:g} of the macs",
        "",
        to_win(table.spread) + over_uniform(table),
        "",
        _line(HEADS),
        _line(["---"] * len(HEADS)),
        *(_line(_cells(row, bold=row.candidate.name in front)) for row in shown),
        "",
        f"{len(table.plans)} plans, {len(rows)} scores, of which the table shows the best {SHOWN} of each kind and, in "
        "bold, those that no cheaper one beats. Intervals: 95 %, plans resampled; the best of many scores is a little "
        "too good. Seconds: median of a plan, on one thread, without what is made once for the network.",
        "",
        confirmation(table, rows[0]),
    ]
    return "\n".join(lines)


def to_win(spread: Spread) -> str:
    """What there is to win, and how much of it is noise."""
    span = f"{100 * spread.low:.2f} and {100 * spread.high:.2f} %"
    text = f"After fine-tuning, {spread.plans} plans lie between {span}, with a standard deviation of "
    text += f"{100 * spread.deviation:.2f} points. "
    if not spread.noise:
        return text + "No plan has two different seeds, so the noise is not known."
    ratio = spread.deviation / spread.noise
    text += f"Another seed moves a plan by {100 * spread.noise:.2f} points ({spread.pairs} plans with two seeds). "
    if spread.ceiling is not None:
        text += f"No score can be expected to agree with one seed better than with tau-b {spread.ceiling:.2f}. "
    if ratio >= 2:
        return text + f"Plans differ {ratio:.1f} times as much as seeds: there is something to win."
    return text + f"Plans differ only {ratio:.1f} times as much as seeds: there is hardly more to win than the noise."


def over_uniform(table: Table) -> str:
    """How many plans are above uniform l1, and what luck alone would make of as many equal ones."""
    plans, noise = len(table.plans), table.spread.noise
    at = next((i for i, name in enumerate(table.plans) if name.endswith(UNIFORM)), None)
    if at is None:
        return ""
    over = 100 * (table.truth - table.truth[at])
    text = f" Uniform l1 has {100 * table.truth[at]:.2f} %: {(over > 0).sum()} of the other {plans - 1} plans are above"
    text += f" it, the highest by {over.max():.2f} points." if over.max() > 0 else " it."
    if noise:
        # The expected largest of n normal draws, nearly (Blom 1958).
        luck = noise * NormalDist().inv_cdf((plans - 0.375) / (plans + 0.25))
        text += f" By luck alone the highest of {plans} equal plans would lie {100 * luck:.2f} points above their mean."
    return text


def confirmation(table: Table, best: Judged) -> str:
    """What the test split says, which nothing was chosen by."""
    test = 100 * table.test
    chosen, top = int(best.candidate.values.argmax()), int(table.truth.argmax())
    uniform = [i for i, name in enumerate(table.plans) if name.endswith(UNIFORM)]
    text = (
        f"On the test split: the truth's ranking agrees with tau-b {table.tested:.2f}; the best plan "
        f"of `{best.candidate.name}` ({table.plans[chosen]}) has {test[chosen]:.2f} %, the truth's best "
        f"({table.plans[top]}) {test[top]:.2f} %"
    )
    text += "".join(f", uniform l1 {test[i]:.2f} %" for i in uniform) + "."
    text += f" There, plans have a standard deviation of {100 * table.test_spread.deviation:.2f} points"
    noise = table.test_spread.noise
    return text + ("." if noise is None else f", and another seed moves one by {100 * noise:.2f}.")


def _cells(row: Judged, *, bold: bool) -> list[str]:
    name = f"**{row.candidate.name}**" if bold else row.candidate.name
    regrets = [one.text(2, 100) for one in (row.first, row.short_list)]
    return [name, row.candidate.kind, f"{row.candidate.cpu_s:.3g}", row.tau.text(), *regrets]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _csv(rows: dict[float, list[Judged]]) -> str:
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    estimates = [f"{name}{end}" for name in ("tau", "regret", f"regret_top{TOP}") for end in ("", "_low", "_high")]
    table.writerow(["budget", "score", "kind", "cpu_s", "wall_s", *estimates])
    for budget, some in rows.items():
        for row in some:
            one = row.candidate
            numbers = [n for e in (row.tau, row.first, row.short_list) for n in (e.value, e.low, e.high)]
            costs = [f"{one.cpu_s:.4g}", f"{one.wall_s:.4g}"]
            table.writerow([budget, one.name, one.kind, *costs, *(f"{number:.4f}" for number in numbers)])
    return stream.getvalue()
