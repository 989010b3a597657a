"""Rows of a comparison, and what one method is above each of the others, paired by seed.

After fine-tuning where cells were fine-tuned, else as cut, repaired and recalibrated; test split.

python -m benchmarks.against --results runs/records/lasting-compare-cifar10-resnet20/results.csv --method td3
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.cli import guarded, parse
from agents.intervals import interval
from prune_env.checks import check_name

Line = Mapping[str, str]
"""A line of the file: a finished cell."""

Rows = Mapping[str, Mapping[int, Line]]
"""Method -> seed -> line of the file."""

BEFORE, AFTER = "test_accuracy", "fine_tuned_test_accuracy"


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    results: Path
    """`results.csv` of a comparison."""
    method: str = "td3"
    """Method that the others are compared with."""


def sections(lines: Sequence[Line]) -> dict[tuple[str, str], Rows]:
    """Task and budget -> its rows. Dense networks are left out, and cells without what others there have at the end."""
    done = [line for line in lines if line["kind"] != "dense" and line[BEFORE]]
    found: dict[tuple[str, str], dict[str, dict[int, Line]]] = {}
    for line in done:
        place = line["task"], line["budget"]
        tuned = any(other[AFTER] for other in done if (other["task"], other["budget"]) == place)
        if line[AFTER] or not tuned:
            found.setdefault(place, {}).setdefault(line["method"], {})[int(line["seed"])] = line
    return dict(found)


def accuracies(rows: Rows) -> dict[str, dict[int, float]]:
    """Method -> seed -> accuracy at the end, in per cent."""
    return {
        name: {seed: 100 * float(line[AFTER] or line[BEFORE]) for seed, line in sorted(seeds.items())}
        for name, seeds in rows.items()
    }


def above(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Mean difference over the seeds that both have, with its interval."""
    over = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    return f"{np.mean(over):+.2f} ({interval(over)})" if over else ""


def table(rows: Rows, method: str) -> str:
    """Markdown, best mean first; accuracies and differences in per cent, CPU seconds to find and repair the plan.

    Raises:
        ValueError: There is no such method.
    """
    check_name("method", method, rows)
    final = accuracies(rows)
    tuned = any(line[AFTER] for seeds in rows.values() for line in seeds.values())
    first, last = ("before", "fine-tuned") if tuned else ("search split", "test split")
    text = [f"| plan | {first} | {last} | by seed | {method} above it | CPU s |", "|---|---|---|---|---|---|"]
    for name in sorted(rows, key=lambda one: -np.mean(list(final[one].values()))):
        lines, values = rows[name].values(), final[name].values()
        before = np.mean([100 * float(line[BEFORE if tuned else "search_accuracy"]) for line in lines])
        by_seed = ", ".join(f"{value:.2f}" for value in values)
        said = "" if name == method else above(final[method], final[name])
        seconds = np.mean([float(line["cpu_seconds_find"] or 0) for line in lines])
        text.append(f"| {name} | {before:.2f} | {np.mean(list(values)):.2f} | {by_seed} | {said} | {seconds:.0f} |")
    return "\n".join(text)


def over_budgets(places: Sequence[Rows], method: str) -> str:
    """What the method is above each other one in the mean of several budgets, paired by seed.

    A seed counts where both methods have it at every budget; a method that is missing at one is left out.
    """
    found = [accuracies(rows) for rows in places]
    text = []
    for name in found[0]:
        if name == method or not all({name, method} <= rows.keys() for rows in found):
            continue
        ours, theirs = (
            {seed: float(np.mean([rows[one][seed] for rows in found])) for seed in _common(found, one)}
            for one in (method, name)
        )
        text.append(f"- {method} above {name}: {above(ours, theirs)}")
    return "\n".join(text)


def _common(found: Sequence[Mapping[str, Mapping[int, float]]], name: str) -> list[int]:
    """Seeds that a method has at every budget."""
    return sorted(set.intersection(*(set(rows[name]) for rows in found)))


def run(arguments: Arguments) -> int:
    """Print a table for each task and budget, and the means over budgets of each task."""
    with arguments.results.open(newline="") as stream:
        found = sections(list(csv.DictReader(stream)))
    for (task, budget), rows in found.items():
        sys.stdout.write(f"{task} at {budget} of the budgeted resource\n\n{table(rows, arguments.method)}\n\n")
    for task in dict.fromkeys(task for task, _ in found):
        places = [rows for (name, _), rows in found.items() if name == task]
        if len(places) > 1:
            sys.stdout.write(f"{task}, mean of {len(places)} budgets\n\n{over_budgets(places, arguments.method)}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(parse(Arguments, sys.argv[1:], program="python -m benchmarks.against"))))
