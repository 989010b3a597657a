"""Cells of tables of runs: a run made, resumed or read, and its record, written once and checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from agents import search_baselines, train
from agents.cli import INTERRUPTED
from agents.config import TrainConfig
from agents.record import RunFolder
from agents.search_config import SearchConfig
from prune_env.files import write

COMMON = (
    "task", "weights", "epochs", "budget", "importance", "refit", "recalibrate", "calibration_images", "algorithm",
    "shape", "episodes", "random_plans", "threads", "seed",
)  # fmt: skip
"""Fields of a run that a table decides; the rest is a method's own."""

Record = dict[str, Any]


def arguments(config: TrainConfig) -> list[str]:
    """The command line of a run: every common field, so that no algorithm puts its own in their place."""
    searches = {"algorithm": "method", "episodes": "evaluations"} if isinstance(config, SearchConfig) else {}
    listed = ["--recalibrate" if config.recalibrate else "--no-recalibrate"]
    for name in COMMON:
        value = getattr(config, name)
        if name != "recalibrate" and value is not None:
            listed += [f"--{searches.get(name, name).replace('_', '-')}", str(value)]
    return listed


def finished(config: TrainConfig, folder: Path) -> RunFolder:
    """A run at its end: made, resumed, or, if it is finished, only read.

    Args:
        config: Of the run; threads must be given.
        folder: Folder of the run's folder.

    Raises:
        ValueError: The run's folder holds a run with other settings, or the run failed.
        KeyboardInterrupt: The run was interrupted; the same call goes on with it.
    """
    path = folder / config.name
    order = ["--resume", str(path)] if path.exists() else [*arguments(config), "--runs", str(folder)]
    if path.exists():
        _check_same(config, path)
    if not train.finished(path):
        code = (search_baselines if isinstance(config, SearchConfig) else train).main(order)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise ValueError(f"the run {path} ended with exit code {code}")
        _check_same(config, path)
    return RunFolder.open(path)


def _check_same(config: TrainConfig, path: Path) -> None:
    """Refuse a run with other settings; a resumed run keeps its number of threads, which changes no result here."""
    held, wanted = (json.loads(one.to_json()) for one in (RunFolder.open(path).config, config))
    for name, value in wanted.items():
        if held[name] != value and name != "threads":
            raise ValueError(f"{path} holds a run with {name} {held[name]}, not {value}; choose another folder")


def search_seconds(run: Path) -> float:
    """Seconds of a run's evaluations and learning, all its processes together; neither its task nor its report.

    From the clock in the run's events: each log is opened right before the first evaluation of its process.
    """
    total = 0.0
    for log in sorted((run / "tensorboard").glob("events.*")):
        events = list(EventFileLoader(str(log)).Load())
        played = [one.wall_time for one in events if any(v.tag == "search/accuracy" for v in one.summary.value)]
        total += played[-1] - events[0].wall_time if played else 0.0
    return total


def share_row(row: Mapping[str, Any], dense: Mapping[str, Any]) -> Record:
    """A row of a run's report, with shares of the dense network in place of absolute sizes."""
    kept = ("search_accuracy", "test_accuracy", "counts", "source", "episode", "tried")
    shares = {f"{size}_share": row[size] / dense[size] for size in ("macs", "params")}
    return {name: row[name] for name in kept if name in row} | shares


def read(file: Path, facts: Record) -> Record | None:
    """A cell's record, if there is one.

    Args:
        file: Where it is.
        facts: What tells the cell apart; the record says the same.

    Raises:
        ValueError: It is of other settings, or corrupt.
    """
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is corrupt: {error}") from None
    for name, value in facts.items():
        if record.get(name) != value:
            raise ValueError(f"{file} has {name} {record.get(name)}, not {value}; choose another folder")
    return record


def read_or_made(file: Path, facts: Record, *, run: Callable[[], Record]) -> Record:
    """A cell's record, or what a run gives, recorded."""
    record = read(file, facts)
    if record is None:
        record = run()
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(record, indent=2))
    return record


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
