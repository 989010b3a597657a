"""Predictors for the reward `predicted`, learned from the plans of a study that have a truth and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lasting.candidates import Table
from benchmarks.lasting.ranking import predicted, ridge, tau
from benchmarks.lasting.study import Study
from prune_env.envs.predictor import Predictor
from prune_env.envs.widths import WIDTHS
from prune_env.files import write

REPAIRS = {"recalibrated": "none", "refit": "moments"}
"""Family of instant measurements, and name of the file -> refit of the runs that it is for."""
FEATURES = ("log_widths", "log_params", "tilt", "neg_loss")
"""What is cheap, and on which few plans are enough to learn."""


def write_predictors(study: Study, found: Sequence[Table]) -> list[Path]:
    """Write a predictor for each repair of which all plans have the scores.

    Args:
        study: Whose network it is.
        found: Its columns, budget by budget; they are learned from together.

    Returns:
        The files.

    Raises:
        ValueError: The plans have no such scores.
        OSError: A file cannot be written.
    """
    channels = study.problem("l1", "none").channels
    files = []
    for family, refit in REPAIRS.items():
        names = [f"widths {name}" if name in WIDTHS else f"{family} {name}" for name in FEATURES]
        if all(set(names) <= {one.name for one in table.candidates} for table in found):
            made = fitted(found, names, task=study.settings.task, channels=channels, refit=refit)
            files.append(study.folder / "predictors" / f"{family}.json")
            files[-1].parent.mkdir(exist_ok=True)
            write(files[-1], made.to_json())
    if not files:
        raise ValueError(f"{study.folder} has no plans with widths and an instant measurement; run the scores first")
    return files


def fitted(
    found: Sequence[Table], names: Sequence[str], *, task: str, channels: tuple[int, ...], refit: str
) -> Predictor:
    """A predictor from all plans; its tau is that of plans left out of the fit, mean over budgets.

    Args:
        found: Columns, budget by budget.
        names: The columns of `FEATURES`.
        task: Name of the task.
        channels: Of the groups that plans decide.
        refit: Of the networks that were measured.
    """
    columns = np.concatenate([_columns(table, names) for table in found])
    truth = np.concatenate([table.truth for table in found])
    line = ridge(columns, truth)
    constant = float(line(np.zeros((1, len(names))))[0])
    weights = line(np.eye(len(names))) - constant
    ends = np.cumsum([len(table.plans) for table in found])[:-1]
    pairs = zip(np.split(predicted(columns, truth), ends), np.split(truth, ends), strict=True)
    return Predictor(
        task=task,
        channels=channels,
        refit=refit,
        recalibrate=True,
        features=FEATURES,
        weights=tuple(weights.tolist()),
        constant=constant,
        plans=len(truth),
        tau=float(np.mean([tau(*pair) for pair in pairs])),
    )


def _columns(table: Table, names: Sequence[str]) -> np.ndarray:
    """`[plan, column]` of a budget."""
    values = {one.name: one.values for one in table.candidates}
    return np.stack([values[name] for name in names], axis=1)
