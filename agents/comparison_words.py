"""What a comparison says in words: the lead of its report, and the takeaways over its figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agents.comparison_figures import aim_of, kept_share
from agents.comparison_methods import DENSE
from agents.comparison_store import Record
from agents.comparison_summary import BEFORE, LEAST_SEEDS, Claim, Summary, claims, front, score

TUNED = "after fine-tuning"


def lead(rows: Sequence[Summary], records: Sequence[Record], missing: int) -> list[str]:
    """What was compared on one task, what came out, and what that is worth.

    Args:
        rows: Finished rows of the task, the dense one included.
        records: Of all cells, failed ones included.
        missing: Cells that nobody has measured yet.
    """
    pruned = [row for row in rows if row.method != DENSE]
    if not pruned:
        return ["No cell was measured yet." if not rows else "Only the dense network was measured yet."]
    return [_what(pruned, records, missing), _outcome(rows, pruned), _worth(pruned)]


def _what(rows: Sequence[Summary], records: Sequence[Record], missing: int) -> str:
    protocol = rows[0].records[0]["protocol"]
    methods = list(dict.fromkeys(row.method for row in rows))
    aims = aims_of(rows)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    epochs, evaluations = protocol["fine_tune_epochs"], protocol["evaluations"]
    tuned = f"then trained for {_count(epochs, 'epoch')}" if epochs else "without any training after the cut"
    failed = sum("failed" in record for record in records)
    state = f"{_count(len(records) - failed, 'cell')} measured"
    state += f", {failed} failed (listed below)" if failed else ", none failed"
    state += f", {missing} not measured yet" if missing else ""
    spent = any(row.kind in ("search", "learned") for row in rows)
    paid = {"accuracy": "", "instant": ""}.get(protocol["reward"], f", paid by {protocol['reward']}")
    searched = f" Agents and searches measured at most {evaluations} networks each{paid}." if spent else ""
    return (
        f"{_count(len(methods), 'method')} pruned the network of {rows[0].task} to {aims}, with "
        f"{_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}): {state}. All got the same dense network and the "
        f"same images for each seed; {protocol['importance']} importance and {protocol['refit']} refit unless the "
        f"method brings its own; {'recalibrated' if protocol['recalibrate'] else 'not recalibrated'}; {tuned}."
        f"{searched} The table of all rows shows every difference that is left."
    )


def _outcome(rows: Sequence[Summary], pruned: Sequence[Summary]) -> str:
    said = []
    for budget in sorted({row.budget for row in pruned if not row.dynamic}, reverse=True):
        static = [row for row in pruned if row.budget == budget and not row.dynamic]
        best, worst = leader(static), min(static, key=_value)
        low = f", the lowest {worst.method} ({_accuracy(worst)})" if worst is not best else ""
        said.append(f"At {aim_of(best, budget)} {best.method} has the highest mean ({_accuracy(best)}){low}.")
    dynamic = [row for row in pruned if row.dynamic]
    for method in dict.fromkeys(row.method for row in dynamic):
        some = sorted((row for row in dynamic if row.method == method), key=lambda row: -row.budget)
        reached = "; ".join(f"at {_share(row.budget)} of mean macs {_accuracy(row)}" for row in some)
        said.append(f"{method} chooses channels anew for every image and reaches {reached}.")
    dense = [row for row in rows if row.method == DENSE]
    return " ".join([*said, *(f"The dense network is at {100 * _value(row):.1f} %." for row in dense)])


def _worth(rows: Sequence[Summary]) -> str:
    """The honest caveat."""
    least = min(len(row.seeds) for row in rows)
    intervals = (
        f"Intervals are 95 % t-intervals over seeds (here {least} or more)"
        if least > 1
        else "Some rows have one seed only"
    )
    found, looked = claims(rows)
    if not looked:
        return (
            f"{intervals}; no two rows have the same evaluations and {LEAST_SEEDS} seeds in common, so no row may be "
            "said to beat another."
        )
    head = (
        f"{intervals}; with so few seeds they are wide, and the highest mean is not the winner. Of "
        f"{_count(looked, 'pair')} of rows with equal budget, evaluations and training,"
    )
    if not found:
        return f"{head} none differs by an interval that excludes 0: which of them is better is not decided here."
    some = "; ".join(said(one) for one in found[:2])
    more = f", and {len(found) - 2} more, listed below" if len(found) > 2 else ""
    chance = f"by chance alone about {max(1, round(looked * 0.05))} of {looked} would"
    return f"{head} {len(found)} differ{'s' * (len(found) == 1)}: {some}{more} ({chance})."


def said(one: Claim) -> str:
    """A difference with all that it holds under."""
    low, high = (100 * (one.mean + side * one.half) for side in (-1, 1))
    return (
        f"{one.better} over {one.worse} at {_share(one.budget)} by {100 * one.mean:.1f} points ({low:.1f} to "
        f"{high:.1f}; {one.seeds} seeds, {_count(one.evaluations, 'evaluation')} each)"
    )


def aims_of(rows: Sequence[Summary]) -> str:
    """All budgets in words."""
    budgets = sorted({row.budget for row in rows}, reverse=True)
    *others, last = [_share(budget) for budget in budgets]
    resource = rows[0].records[0]["protocol"]["budget_resource"]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} of the {resource}" if budgets[-1] <= 1 else f"{listed} {resource}"


def leader(rows: Sequence[Summary]) -> Summary:
    """The row with the highest mean."""
    return max(rows, key=_value)


def title_of_tradeoff(rows: Sequence[Summary]) -> str:
    """What the fronts say."""
    static = [row for row in rows if not row.dynamic]
    points = [(row.mean("macs_share") or 0.0, _value(row)) for row in static]
    names = list(dict.fromkeys(static[i].method for i in front(points)))
    return f"On the front of accuracy and macs, by mean: {', '.join(names)}" if names else "Runtime methods only"


def title_of_methods(rows: Sequence[Summary]) -> str:
    """How far best and worst method are apart, before and after fine-tuning."""
    static = [row for row in rows if not row.dynamic]
    tuned = any(score(row) != BEFORE for row in static)
    gaps = {}
    for budget in sorted({row.budget for row in static}, reverse=True):
        some = [row for row in static if row.budget == budget]
        before = [value for row in some if (value := row.mean(BEFORE)) is not None]
        gaps[budget] = 100 * np.ptp(before), 100 * np.ptp([_value(row) for row in some])
    if not tuned:
        said = ", ".join(f"{before:.1f} points at {_share(budget)}" for budget, (before, _) in gaps.items())
        return f"Best and worst method are {said} apart"
    said = ", ".join(f"from {before:.1f} to {after:.1f} points at {_share(b)}" for b, (before, after) in gaps.items())
    narrows = all(after < before for before, after in gaps.values())
    return f"Fine-tuning {'narrows' if narrows else 'changes'} the gap between best and worst: {said}"


def title_of_profiles(rows: Sequence[Summary]) -> str:
    """In which group methods differ most."""
    static = [row for row in rows if not row.dynamic]
    groups = list(static[0].records[0]["kept"])
    spread = {group: np.ptp([kept_share(row, group) for row in static]) for group in groups}
    most = max(spread, key=lambda group: spread[group])
    low, high = (f(kept_share(row, most) for row in static) for f in (min, max))
    return f"Methods differ most in {most}, of which they keep {100 * low:.0f} to {100 * high:.0f} %"


def title_of_costs(rows: Sequence[Summary]) -> str:
    """What the dearest plan costs beside the cheapest."""
    means = {row.method: value for row in rows if (value := row.mean("find")) is not None}
    if not means:
        return "What finding a plan costs is not known: all cells were interrupted"
    dear, cheap = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
    return f"{dear} takes {means[dear] / max(means[cheap], 1e-9):.0f} times as long as {cheap} to find its plan"


def title_of_spreads(rows: Sequence[Summary]) -> str:
    """How unlike images are."""
    spans = {
        row.method: (row.mean("dynamic_macs_share_95") or 0.0) - (row.mean("dynamic_macs_share_5") or 0.0)
        for row in rows
        if row.dynamic
    }
    most = max(spans, key=lambda name: spans[name])
    return (
        f"Images differ most under {most}: {100 * spans[most]:.1f} % of the dense macs lie between easy and hard ones"
    )


def title_of_ranks(table: dict[str, dict[float, float]]) -> str:
    """Who ranks first."""
    first = next(iter(table))
    budgets = len(table[first])
    mean = float(np.mean(list(table[first].values())))
    return f"Best mean rank over {_count(budgets, 'budget')}: {first}, {mean:.2g} of {len(table)}"


def _value(row: Summary) -> float:
    return row.mean(score(row)) or 0.0


def _accuracy(row: Summary) -> str:
    half = row.half(score(row))
    tuned = f" {TUNED}" if score(row) != BEFORE else ""
    interval = "" if half is None else f" \u00b1 {100 * half:.1f}"
    return f"{100 * _value(row):.1f}{interval} %{tuned}, {_count(len(row.seeds), 'seed')}"


def _share(budget: float) -> str:
    return f"{100 * budget:.3g} %" if budget <= 1 else f"{budget:,.0f}"


def _count(number: int | float, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
