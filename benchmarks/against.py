"""Rows of a comparison after fine-tuning, and what one method is above each of the others, paired by seed.

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

Rows = Mapping[str, Mapping[int, Mapping[str, str]]]
"""Method -> seed -> line of the file."""


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    results: Path
    """`results.csv` of a comparison."""
    method: str = "td3"
    """Method that the others are compared with."""


def rows_of(lines: Sequence[Mapping[str, str]], budget: str) -> Rows:
    """The fine-tuned cells of a budget."""
    found: dict[str, dict[int, Mapping[str, str]]] = {}
    for line in lines:
        if line["budget"] == budget and line["fine_tuned_test_accuracy"]:
            found.setdefault(line["method"], {})[int(line["seed"])] = line
    return found


def table(rows: Rows, method: str) -> str:
    """Markdown, best mean first; accuracies on the test split and differences in per cent.

    Raises:
        ValueError: There is no such method.
    """
    check_name("method", method, rows)
    tuned = {
        name: {seed: 100 * float(line["fine_tuned_test_accuracy"]) for seed, line in sorted(seeds.items())}
        for name, seeds in rows.items()
    }
    lines = [f"| plan | before | fine-tuned | by seed | {method} above it |", "|---|---|---|---|---|"]
    for name in sorted(rows, key=lambda one: -np.mean(list(tuned[one].values()))):
        before = np.mean([100 * float(line["test_accuracy"]) for line in rows[name].values()])
        by_seed = ", ".join(f"{value:.2f}" for value in tuned[name].values())
        over = [tuned[method][seed] - value for seed, value in tuned[name].items() if seed in tuned[method]]
        said = f"{np.mean(over):+.2f} ({interval(over)})" if over and name != method else ""
        lines.append(f"| {name} | {before:.2f} | {np.mean(list(tuned[name].values())):.2f} | {by_seed} | {said} |")
    return "\n".join(lines)


def run(arguments: Arguments) -> int:
    """Print a table for each budget that has fine-tuned cells."""
    with arguments.results.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for budget in dict.fromkeys(line["budget"] for line in lines if line["fine_tuned_test_accuracy"]):
        sys.stdout.write(f"{budget} of the budgeted resource\n\n{table(rows_of(lines, budget), arguments.method)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(parse(Arguments, sys.argv[1:], program="python -m benchmarks.against"))))
