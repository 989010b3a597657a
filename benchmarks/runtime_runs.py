"""Runs of `python -m agents.train runtime` that benchmarks share: made, resumed, or, if finished, only read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agents import runtime_train
from agents.cli import INTERRUPTED
from agents.runtime_options import RuntimeTrainConfig, network_epochs
from benchmarks.cells import Record, read, read_or_made

TRUSTS = {"static": 0.0, "both": 0.5, "runtime": 1.0}
"""Row -> trust of the run that it is; the row of another trust is named by the number."""


@dataclass(frozen=True)
class RunSettings:
    """What the runs of one table or picture have in common."""

    task: str = "digits-cnn"
    """Task name."""
    weights: str | None = None
    """File with the dense weights; without it the network is trained, or loaded from the cache."""
    keep: float = 0.5
    """The share which, kept in every layer, costs the budget."""
    schedule: str | None = None
    """Lengths of the stages; the task's own by default."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of the runs."""
    records: Path | None = None
    """Folder of the finished rows, one small JSON file each; `records` in the folder of the runs by default."""
    epochs: int | None = None
    """Epochs of the dense training; the task's own by default."""

    def config(self, seed: int, trust: float = 0.5) -> RuntimeTrainConfig:
        """The run of one seed at one trust."""
        return RuntimeTrainConfig(
            task=self.task,
            weights=self.weights,
            epochs=self.epochs,
            keep=self.keep,
            runtime_trust=trust,
            schedule=self.schedule,
            threads=self.threads,
            seed=seed,
        )

    def record(self, row: str, seed: int) -> Path:
        """Where a row is recorded."""
        folder = self.records or self.runs / "records"
        schedule = "" if self.schedule is None else f"-{self.schedule}"
        return folder / f"{self.task}-keep{self.keep:g}{schedule}-{row}-seed{seed}.json"


Rows = dict[str, dict[str, Any]]


def recorded(settings: RunSettings, row: str, seed: int) -> Record | None:
    """A row's record if there is one.

    Raises:
        ValueError: It is of other settings, or corrupt.
    """
    return read(settings.record(row, seed), _facts(settings, row, seed))


def made(settings: RunSettings, row: str, seed: int, make: Callable[[], Record]) -> Record:
    """A row from its record, or made and recorded."""
    facts = _facts(settings, row, seed)
    return read_or_made(settings.record(row, seed), facts, run=lambda: {**facts, **make()})


def _facts(settings: RunSettings, row: str, seed: int) -> Record:
    """What tells a row apart."""
    return {"row": row, "seed": seed, "task": settings.task, "keep": settings.keep, "schedule": settings.schedule}


def row_of(trust: float) -> str:
    """The name of the row that agents learn at some trust."""
    return next((row for row, value in TRUSTS.items() if value == trust), f"trust{trust:g}")


def agents_row(settings: RunSettings, trust: float, seed: int) -> Record:
    """A row that agents learn."""
    config = settings.config(seed, trust)
    rows = learned(config, settings.runs)
    dense = {split: rows["dense"][split]["accuracy"] for split in ("search", "test")}
    found = {name: rows["learned"][name] for name in ("search", "test", "offset", "static_keep", "kept")}
    return {"dense": dense, "epochs": network_epochs(config), "trust": config.runtime_trust, **found}


def learned(config: RuntimeTrainConfig, runs: Path) -> Rows:
    """The report of a run, with at least the rows `dense` and `learned`.

    Args:
        config: Of the run; threads must be given.
        runs: Folder of run folders.

    Raises:
        ValueError: The run's folder holds a run with other settings, or a file of it is corrupt.
        KeyboardInterrupt: The run was interrupted; the same call goes on with it.
    """
    path = runs / config.name
    rows = finished(config, runs)
    if rows is None:
        order = ["--resume", str(path)] if path.exists() else [*arguments(config), "--runs", str(runs)]
        if runtime_train.main(order) == INTERRUPTED:
            raise KeyboardInterrupt
        rows = finished(config, runs)
    assert rows is not None
    return rows


def finished(config: RuntimeTrainConfig, runs: Path) -> Rows | None:
    """The report of a run if it has come that far, else None.

    Raises:
        ValueError: The run's folder holds a run with other settings, or a file of it is corrupt.
    """
    path = runs / config.name
    if not path.exists():
        return None
    held, wanted = runtime_train.config_of(path), _resolved(config)
    if replace(held, threads=wanted.threads) != wanted:
        ours, theirs = (json.loads(one.to_json()) for one in (wanted, held))
        name = next(name for name in ours if ours[name] != theirs[name] and name != "threads")
        raise ValueError(f"{path} holds a run with {name} {theirs[name]}, not {ours[name]}; choose another folder")
    report = path / "report.json"
    try:
        rows = json.loads(report.read_text()) if report.exists() else {}
    except ValueError as error:
        raise ValueError(f"{report} is corrupt: {error}") from None
    return rows if "learned" in rows else None


def arguments(config: RuntimeTrainConfig) -> list[str]:
    """The command line of a run: the fields that are not at their default."""
    usual = json.loads(RuntimeTrainConfig().to_json())
    listed: list[str] = []
    for name, value in json.loads(config.to_json()).items():
        if value != usual[name]:
            listed += [f"--{name.replace('_', '-')}", str(value)]
    return listed


def _resolved(config: RuntimeTrainConfig) -> RuntimeTrainConfig:
    """As the command writes it."""
    weights = None if config.weights is None else str(Path(config.weights).expanduser().resolve())
    return replace(config, weights=weights)
