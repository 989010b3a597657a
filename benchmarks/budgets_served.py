"""One run at several budgets: what its agents and its network make of budgets that they were not trained for.

The agents are asked anew at each budget, with the number that moved their shares at the run's own; nothing is trained
or moved again. Measured on the deployed network, test split.

    python -m benchmarks.budgets_served runs/RUN --factors .7 .8 .9 1 1.1 1.2 1.3
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from agents.runtime_report import RuntimeReporter, redeployed
from agents.runtime_stages import RuntimeLearner
from agents.runtime_train import config_of, task_of
from benchmarks.timing import show
from prune_env.files import write
from prune_env.pruning.engine.measurement import measure_deployed

BATCH = 128


@dataclass(frozen=True)
class Settings:
    """One run at several budgets."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished runtime run."""
    factors: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    """Budgets as multiples of the run's own."""
    threads: int = torch.get_num_threads()
    """CPU threads."""
    out: Path | None = None
    """File for the rows, JSON."""


def rows(settings: Settings) -> list[dict[str, Any]]:
    """What each budget comes to on the test split.

    Raises:
        ValueError: No finished runtime run, or a budget that cannot be reached.
    """
    config = config_of(settings.run)
    task = task_of(config)
    learner = RuntimeLearner(task, config, settings.run)
    learner.restore()
    reporter = RuntimeReporter(task, learner, settings.run, lambda *_: None)
    if "learned" not in reporter.recorded():
        raise ValueError(f"{settings.run} is not finished; go on with: python -m agents.train --resume {settings.run}")
    found = []
    for factor in settings.factors:
        budget = min(factor * learner.budget.fraction, 1.0)
        network, _ = redeployed(settings.run, config, budget)
        measured = measure_deployed(network, task.test.batches(BATCH), dtype=learner.problem.dtype)
        found.append({"budget": budget, **measured.row()})
    return found


def main(settings: Settings) -> None:
    """Measure and print."""
    torch.set_num_threads(settings.threads)
    found = rows(settings)
    if settings.out is not None:
        write(settings.out, json.dumps(found, indent=2))
    show(
        f"{settings.run.name}, test split",
        ["budget", "macs", "5 % to 95 %", "test accuracy", "params"],
        [
            [
                f"{row['budget']:.3f}",
                f"{row['dynamic_macs_share']:.3f}",
                " - ".join(f"{row['dynamic_macs_percentiles'][at]:.3f}" for at in ("5", "95")),
                f"{row['accuracy']:.4f}",
                f"{row['params_share']:.2f}",
            ]
            for row in found
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
