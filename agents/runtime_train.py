"""`python -m agents.train runtime`: learn runtime and static channel pruning, stage by stage."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from agents.cli import INTERRUPTED, parse, stages
from agents.record import refuse_existing
from agents.runtime_options import RuntimeTrainConfig, task_of
from agents.runtime_report import RuntimeReporter
from agents.runtime_stages import RuntimeLearner
from prune_env.files import sweep, write


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    config: tyro.conf.OmitArgPrefixes[RuntimeTrainConfig]
    """The run."""
    runs: Path = Path("runs")
    """Folder in which the run's folder is made."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to go on with; all other settings are its own."""


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    order = parse(Order, arguments, program="python -m agents.train runtime")
    config, console = order.config, Console()
    if order.resume is not None:
        path = order.resume
        config = config_of(path)
    else:
        if config.weights is not None:
            config = replace(config, weights=str(Path(config.weights).expanduser().resolve()))
        path = order.runs / config.name
        refuse_existing(path)
    try:
        rows = _run(config, path, console)
    except KeyboardInterrupt:
        resume = f"--resume {path}" if path.exists() else "the same arguments: nothing was trained yet"
        console.print(f"\ninterrupted; go on with: python -m agents.train runtime {resume}", soft_wrap=True)
        return INTERRUPTED
    console.print(table(config, rows))
    console.print(f"run folder: {path}", soft_wrap=True)
    return 0


def config_of(path: Path) -> RuntimeTrainConfig:
    """The config of a runtime run.

    Raises:
        ValueError: No run folder, or its config is corrupt.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is no run folder: it has no config.json")
    try:
        return RuntimeTrainConfig.from_json(file.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is corrupt: {str(error).splitlines()[0]}") from None


def _run(config: RuntimeTrainConfig, path: Path, console: Console) -> dict[str, dict[str, Any]]:
    """One run from where it is to its end; its rows.

    Raises:
        ValueError: Bad input; nothing is left behind if the run had not begun.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = replace(config, threads=config.threads or torch.get_num_threads())
    console.rule(f"{config.task}, runtime trust {config.runtime_trust:g}, seed {config.seed}")
    with stages(console) as tell:
        task = task_of(config, progress=tell)
        learner = RuntimeLearner(task, config, path)
        if not path.exists():
            create(path, config)
        sweep(path)
        writer = SummaryWriter(str(path / "tensorboard"))

        def log(at: int, figures: dict[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(f"stage/{name}", value, at)
            said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            console.print(f"stage {at + 1}: {learner.history[-1]['kind']}: {said}")

        learner.run(tell, log)
        reporter = RuntimeReporter(task, learner, path, tell)
        rows = reporter.rows()
        reporter.store()
        for name, row in rows.items():
            writer.add_scalar(f"final/{name}_test_accuracy", float(row["test"]["accuracy"]), 0)
        writer.close()
    return rows


def create(path: Path, config: RuntimeTrainConfig) -> None:
    """A new run folder that already holds its config; it appears at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft.chmod(0o755)
        write(draft / "config.json", config.to_json())
        os.rename(draft, path)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def table(config: RuntimeTrainConfig, rows: dict[str, dict[str, Any]]) -> Table:
    """The final table."""
    built = Table(
        title=f"{config.task}, runtime trust {config.runtime_trust:g}",
        caption="macs: mean over test images, predictors counted; params: stored, predictors and agent counted; "
        "by image: channels active for some test images and not for others",
        title_style="bold",
    )
    built.add_column("decisions")
    for head in ("search accuracy", "test accuracy", "macs", "5 % to 95 %", "faster (macs)", "params", "by image"):
        built.add_column(head, justify="right")
    for name, row in rows.items():
        test, spread = row["test"], row["test"]["dynamic_macs_percentiles"]
        built.add_row(
            name,
            f"{row['search']['accuracy']:.4f}",
            f"{test['accuracy']:.4f}",
            f"{test['dynamic_macs_share']:.3f}",
            f"{spread['5']:.3f} - {spread['95']:.3f}",
            f"{test['speed_up_macs']:.2f}x",
            f"{test['params_share']:.2f}",
            f"{np.mean(test['varying_channels'] or [0]):.0%}",
            style="bold" if name == "learned" else None,
        )
    return built
