"""Accuracy against params and macs kept: Provable Filter Pruning beside uniform and global magnitude.

All are cut once from the same network and recalibrated on the same images, and fine-tuned, if at all, by the same
recipe. Rows are written as they are measured; rows that the folder holds already are not measured again.

    python -m benchmarks.pfp_curve --task cifar10-resnet20 --weights FILE.safetensors --out DIR
    python -m benchmarks.pfp_curve --task cifar10-resnet20 --weights FILE.safetensors --out DIR --fine-tune-epochs 3
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from torch import nn

from baselines import METHODS, Method
from baselines.method import run
from baselines.provable_filter_pruning import bounds, one_epsilon, sensitivity
from benchmarks.timing import show
from prune_env.config import make_problem, make_task
from prune_env.envs.dynamics import Problem
from prune_env.files import write
from prune_env.number_format import number_format
from prune_env.pruning.measure import Meter
from prune_env.pruning.sensitivity import largest
from prune_env.tasks.dense import recipe
from prune_env.tasks.task import Task
from prune_env.tasks.training import train

Row = dict[str, Any]

CURVES: dict[str, Method] = {
    "uniform": METHODS["uniform"],
    "global_magnitude": METHODS["global_magnitude"],
    "lamp": METHODS["lamp"],
    "pfp": METHODS["provable_filter_pruning"],
    "pfp_random": METHODS["provable_filter_pruning_random"],
    "pfp_mixed": METHODS["provable_filter_pruning_mixed"],
    "pfp_max": Method(
        "pfp_max",
        "as released: the largest share of a single weight",
        importance=partial(sensitivity, shares=largest),
        allocate=partial(one_epsilon, shares=largest),
    ),
    "pfp_counts": Method(
        "pfp_counts", "one epsilon decides the counts, the l1 norm the channels", allocate=one_epsilon
    ),
}
"""Name in the table -> method. The importance that the user names ranks where a method has none of its own."""


@dataclass(frozen=True)
class Settings:
    """Accuracy against params and macs kept."""

    task: str = "digits-cnn"
    """Task name."""
    weights: str | None = None
    """Weights of the task's network; none trains it or takes it from the cache."""
    out: Path = Path("runs/pfp_curve")
    """Folder for curve.json and curve.csv."""
    budgets: tuple[float, ...] = (0.8, 0.65, 0.5, 0.35, 0.2)
    """Shares of each resource."""
    resources: tuple[str, ...] = ("macs", "params")
    """What budgets bound."""
    methods: tuple[str, ...] = tuple(CURVES)
    """Rows to measure."""
    importance: str = "l1"
    """Ranks the channels of methods that have no scores of their own."""
    recalibrate: bool = True
    """Re-estimate BatchNorm statistics after the cut."""
    refit: str = "none"
    """Refit of the layers behind a cut; the random variants reweight in its place."""
    fine_tune_epochs: int = 0
    """Epochs of fine-tuning, the same for all."""
    fine_tune_lr: float = 0.05
    """Peak learning rate of the fine-tuning."""
    seed: int = 0
    """Seed of all that is drawn."""
    threads: int = 1
    """CPU threads."""


COLUMNS = ("method", "resource", "budget", "macs", "params", "search_accuracy", "test_accuracy", "seconds")
TUNED = ("fine_tuned_search_accuracy", "fine_tuned_test_accuracy")


def key_of(row: Row) -> tuple[str, str, float]:
    """What tells two rows apart."""
    return row["method"], row["resource"], row["budget"]


def measured(name: str, problem: Problem, task: Task, settings: Settings) -> Row:
    """One method at the problem's budget."""
    begin = perf_counter()
    result = run(CURVES[name], problem, task=task, seed=settings.seed)
    seconds = perf_counter() - begin
    row = {
        "method": name,
        "resource": problem.resource,
        "budget": problem.value,
        "macs": result.search.macs / problem.dense.macs,
        "params": result.search.params / problem.dense.params,
        "search_accuracy": result.search.accuracy,
        "test_accuracy": result.test.accuracy,
        "seconds": round(seconds, 2),
        "counts": list(result.counts.values()),
    }
    if settings.fine_tune_epochs:
        network = fine_tuned(result.network, task, settings)
        row["fine_tuned_search_accuracy"] = problem.evaluator.meter.accuracy_and_loss(network)[0]
        row["fine_tuned_test_accuracy"] = test_accuracy(network, task)
    return row


def fine_tuned(network: nn.Module, task: Task, settings: Settings) -> nn.Module:
    """The network, trained by the usual recipe of its task, shorter and with a lower peak."""
    own = recipe(task.data, task.network_name, seed=settings.seed)
    shorter = replace(own, epochs=settings.fine_tune_epochs, lr=settings.fine_tune_lr, threads=settings.threads)
    network = copy.deepcopy(network).requires_grad_(True)
    train(network, task.train, settings=shorter)
    return network


def test_accuracy(network: nn.Module, task: Task) -> float:
    """Accuracy on the test split."""
    images, labels = task.test.take(len(task.test))
    return Meter(images, labels, dtype=number_format(network, images)).accuracy_and_loss(network)[0]


def conditions(settings: Settings) -> dict[str, Any]:
    """What must be the same for all rows of a folder, as JSON holds it."""
    varied = ("out", "budgets", "resources", "methods", "threads")
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in varied}


def known_rows(settings: Settings) -> list[Row]:
    """The rows that the folder holds.

    Raises:
        ValueError: They were measured under other conditions.
    """
    file = settings.out / "curve.json"
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    if record["conditions"] != conditions(settings):
        raise ValueError(f"{file} holds {record['conditions']}, not {conditions(settings)}; choose another folder")
    return record["rows"]


def save(rows: list[Row], dense: Row, settings: Settings) -> None:
    """Write curve.json and curve.csv."""
    settings.out.mkdir(parents=True, exist_ok=True)
    record = {"conditions": conditions(settings), "dense": dense, "rows": rows}
    write(settings.out / "curve.json", json.dumps(record, indent=2))
    text = io.StringIO()
    table = csv.DictWriter(text, columns(settings), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(settings.out / "curve.csv", text.getvalue())


def columns(settings: Settings) -> tuple[str, ...]:
    """What the table shows."""
    return COLUMNS + (TUNED if settings.fine_tune_epochs else ())


def main(settings: Settings) -> None:
    """Measure what is missing and print the table."""
    torch.set_num_threads(settings.threads)
    rows = known_rows(settings)
    task = make_task(settings.task, weights=settings.weights)
    problem = make_problem(
        task, budget=1.0, importance=settings.importance, recalibrate=settings.recalibrate, refit=settings.refit
    )
    begin = perf_counter()
    bounds(problem)
    print(f"sensitivities of {len(problem.graph.groups)} groups: {perf_counter() - begin:.1f} s")
    dense = {**dataclasses.asdict(problem.dense), "test_accuracy": test_accuracy(task.network, task)}
    for resource, budget, name in itertools.product(settings.resources, settings.budgets, settings.methods):
        if (name, resource, budget) not in {key_of(row) for row in rows}:
            rows.append(measured(name, replace(problem, resource=resource, value=budget), task, settings))
            save(rows, dense, settings)
    rows.sort(key=lambda row: (row["resource"], -row["budget"]))
    shown = [[_cell(row[column]) for column in columns(settings)] for row in rows]
    title = f"{task.name}, dense: search {dense['accuracy']:.4f}, test {dense['test_accuracy']:.4f}"
    show(
        title, [column.replace("fine_tuned", "tuned").removesuffix("_accuracy") for column in columns(settings)], shown
    )


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
