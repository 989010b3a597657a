"""`python -m agents.evaluate RUN` for a runtime run: its decisions again from its files, beside the record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from agents.cli import stages
from agents.runtime_report import RuntimeReporter
from agents.runtime_stages import RuntimeLearner, stages_of
from agents.runtime_train import config_of, task_of

COMPARED = ("accuracy", "loss", "dynamic_macs", "params")
DISAGREES = 1


def evaluate(path: Path, console: Console) -> int:
    """Measure the learned decisions of a finished run anew and compare them with its report.

    Args:
        path: The run's folder.
        console: Where the table goes.

    Returns:
        0, or 1 if the record does not agree.

    Raises:
        ValueError: The run is not finished, or a file of it is corrupt.
    """
    config = config_of(path)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with stages(console) as tell:
        learner = RuntimeLearner(task_of(config, progress=tell), config, path)
        learner.restore()
        reporter = RuntimeReporter(learner.task, learner, path, tell)
        recorded = reporter.recorded().get("learned")
        if recorded is None or learner.done < len(stages_of(config)):
            raise ValueError(f"{path} is not finished: python -m agents.train runtime --resume {path}")
        found = reporter.again(recorded)
    wrong = [
        f"{split} {name} is {found[split][name]}, recorded {recorded[split][name]}"
        for split in ("search", "test")
        for name in COMPARED
        if not math.isclose(found[split][name], recorded[split][name], rel_tol=1e-4)
    ]
    console.print(_table(path, recorded, found))
    for line in wrong:
        console.print(f"[bold red]the record does not agree[/]: {line}")
    if not wrong:
        console.print("the record agrees")
    return DISAGREES if wrong else 0


def _table(path: Path, recorded: dict[str, Any], found: dict[str, Any]) -> Table:
    built = Table(title=str(path), title_style="bold")
    for head in ("", "recorded", "replayed"):
        built.add_column(head, justify="left" if not head else "right")
    for split in ("search", "test"):
        for name in (*COMPARED, "dynamic_macs_share"):
            cells = (_number(rows[split][name]) for rows in (recorded, found))
            built.add_row(f"{split} {name.replace('_', ' ')}", *cells)
    for percent, share in found["test"]["dynamic_macs_percentiles"].items():
        then = recorded["test"]["dynamic_macs_percentiles"][percent]
        built.add_row(f"test macs share, {percent} %", _number(then), _number(share))
    return built


def _number(value: int | float) -> str:
    return f"{value:,.0f}" if value > 1000 else f"{value:.4f}"
