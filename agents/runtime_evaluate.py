"""`python -m agents.evaluate RUN` for a runtime run: the deployed network from its files, beside the record."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from agents.cli import stages
from agents.config import own_package
from agents.runtime_options import RuntimeTrainConfig, task_of
from agents.runtime_train import config_of
from prune_env.files import write
from prune_env.number_format import number_format
from prune_env.pruning import archive
from prune_env.pruning.engine.deployed import DeployedNetwork
from prune_env.pruning.engine.measurement import compare_latency, disagreement, measure_deployed
from prune_env.pruning.engine.native import compiled
from prune_env.tasks.task import Task

COMPARED = ("accuracy", "loss", "dynamic_macs", "params")
DISAGREES = 1
BATCH = 128
CHECKED, TIMED = 256, 16
"""Test images that the engine is checked and timed on."""
TOLERANCE = 1e-4
"""Allowed difference of the engine's outputs, relative to the largest."""


def evaluate(path: Path, console: Console, *, threads: int = 1) -> int:
    """Measure the deployed network of a finished run anew, compare it with the report, and time it.

    Args:
        path: The run's folder.
        console: Where the table goes.
        threads: CPU threads for the latency.

    Returns:
        0, or 1 if the record does not agree.

    Raises:
        ValueError: The run is not finished, or a file of it is corrupt.
    """
    config = config_of(path)
    recorded = _recorded(path)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with stages(console) as tell:
        task = task_of(config, progress=tell)
        deployed = archive.load(path, allow=own_package(config.task, config.network))
        if not isinstance(deployed, DeployedNetwork):
            raise ValueError(f"{path} does not hold a deployed network")
        found = measured(task, deployed, config)
        images = task.test.take(CHECKED)[0].float()
        far, differs = disagreement(deployed, images)
        latencies = compare_latency(task.network, deployed, images[:TIMED].split(1), threads=threads)
    wrong = [
        f"{split} {name} is {found[split][name]}, recorded {recorded[split][name]}"
        for split in ("search", "test")
        for name in COMPARED
        if not math.isclose(found[split][name], recorded[split][name], rel_tol=1e-4)
    ]
    if far > TOLERANCE:
        wrong.append(f"the engine's outputs are {far:.1e} from the masked ones, of the largest output")
    console.print(_table(path, recorded, found))
    console.print(
        f"engine ({'compiled kernel' if compiled() else 'torch operations'}): on {len(images)} test images, one by "
        f"one, outputs within {far:.0e} of the masked ones; {differs:.1%} of the choices differ by a near tie",
        soft_wrap=True,
    )
    for name, latency in latencies.items():
        console.print(
            f"{name}: {latency.median_s * 1e3:.3f} ms for one image (median, interquartile range "
            f"{latency.iqr_s * 1e3:.3f} ms; {latency.threads} threads, {latency.dtype}, {latency.device})",
            soft_wrap=True,
        )
    faster = latencies["dense"].median_s / latencies["deployed"].median_s
    console.print(f"{faster:.2f}x faster at {found['test']['speed_up_macs']:.2f}x fewer macs")
    write(
        path / f"latency-{threads}.json", json.dumps({name: asdict(one) for name, one in latencies.items()}, indent=2)
    )
    for line in wrong:
        console.print(f"[bold red]the record does not agree[/]: {line}")
    if not wrong:
        console.print("the record agrees")
    return DISAGREES if wrong else 0


def measured(task: Task, deployed: DeployedNetwork, config: RuntimeTrainConfig) -> dict[str, dict[str, Any]]:
    """The rows of a deployed network on both splits."""
    splits, dtype = {"search": task.search, "test": task.test}, number_format(deployed.to(config.device), task.example)
    return {name: measure_deployed(deployed, split.batches(BATCH), dtype=dtype).row() for name, split in splits.items()}


def _recorded(path: Path) -> dict[str, Any]:
    """The learned row of a finished run."""
    report = path / "report.json"
    try:
        rows = json.loads(report.read_text()) if report.exists() else {}
    except ValueError as error:
        raise ValueError(f"{report} is corrupt: {error}") from None
    if "learned" not in rows or not (path / archive.MODEL).exists():
        raise ValueError(f"{path} is not finished: python -m agents.train runtime --resume {path}")
    return rows["learned"]


def _table(path: Path, recorded: dict[str, Any], found: dict[str, Any]) -> Table:
    built = Table(title=str(path), title_style="bold")
    for head in ("", "recorded", "replayed"):
        built.add_column(head, justify="left" if not head else "right")
    for split in ("search", "test"):
        for name in (*COMPARED, "params_share", "dynamic_macs_share"):
            cells = (_number(rows[split][name]) for rows in (recorded, found))
            built.add_row(f"{split} {name.replace('_', ' ')}", *cells)
    for percent, share in found["test"]["dynamic_macs_percentiles"].items():
        then = recorded["test"]["dynamic_macs_percentiles"][percent]
        built.add_row(f"test macs share, {percent} %", _number(then), _number(share))
    return built


def _number(value: int | float) -> str:
    return f"{value:,.0f}" if value > 1000 else f"{value:.4f}"
