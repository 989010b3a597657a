"""Accuracy against params and macs kept: Provable Filter Pruning beside uniform and global magnitude.

All are cut once from the same network and recalibrated on the same images, and fine-tuned, if at all, by the same
recipe. Each row is a file, written as it is measured and never measured again; several processes may share a folder.

    python -m benchmarks.pfp_curve --task cifar10-resnet20 --weights FILE.safetensors --out DIR
    python -m benchmarks.pfp_curve --task cifar10-resnet20 --weights FILE.safetensors --out DIR --fine-tune-epochs 3
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import nn

from agents.plot import BLUE, GREEN, GREY, ORANGE, png
from baselines import METHODS, Method
from baselines.method import run
from baselines.provable_filter_pruning import bounds, one_epsilon, sensitivity
from benchmarks import cells
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
    epochs: int | None = None
    """Epochs of a training without weights; none takes the usual number."""
    out: Path = Path("runs/pfp_curve")
    """Folder of the rows, one small JSON file each."""
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
    picture: Path | None = None
    """A PNG to draw all rows of the folder into."""
    only_print: bool = False
    """Print and draw the rows that are recorded, and measure none."""


COLUMNS = ("method", "resource", "budget", "macs", "params", "search_accuracy", "test_accuracy", "seconds")
TUNED = ("fine_tuned_search_accuracy", "fine_tuned_test_accuracy")
COLOURS = {"uniform": GREY, "global_magnitude": ORANGE, "lamp": GREEN, "pfp": BLUE}
"""Of a method's line in the picture; methods that are not named here are in the table alone."""


def measured(name: str, problem: Problem, task: Task, settings: Settings, known: Row) -> Row:
    """One method at the problem's budget, behind what is known of all rows."""
    begin = perf_counter()
    result = run(CURVES[name], problem, task=task, seed=settings.seed)
    seconds = perf_counter() - begin
    row = known | {
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


def facts(settings: Settings) -> Row:
    """What must be the same for all rows of a folder; of the weights the file's name, wherever it lies."""
    varied = ("out", "budgets", "resources", "methods", "threads", "picture", "only_print")
    same = {name: value for name, value in dataclasses.asdict(settings).items() if name not in varied}
    return same | {"weights": None if settings.weights is None else Path(settings.weights).name}


def file_of(settings: Settings, name: str, resource: str, budget: float) -> Path:
    """Where a row is recorded."""
    return settings.out / f"{resource}{budget:g}-{name}.json"


def rows_of(settings: Settings) -> list[Row]:
    """All rows that the folder holds, those of other processes included.

    Raises:
        ValueError: A row was measured under other conditions, or is corrupt.
    """
    found = [cells.read(file, facts(settings)) for file in sorted(settings.out.glob("*.json"))]
    order = list(CURVES)
    rows = [row for row in found if row is not None]
    return sorted(rows, key=lambda row: (row["resource"], -row["budget"], order.index(row["method"])))


def measure_missing(settings: Settings) -> None:
    """Measure and record the rows that are asked for and not recorded."""
    missing = [
        (name, resource, budget)
        for resource, budget, name in itertools.product(settings.resources, settings.budgets, settings.methods)
        if cells.read(file_of(settings, name, resource, budget), facts(settings)) is None
    ]
    if not missing:
        return
    task = make_task(settings.task, weights=settings.weights, epochs=settings.epochs)
    problem = make_problem(
        task, budget=1.0, importance=settings.importance, recalibrate=settings.recalibrate, refit=settings.refit
    )
    begin = perf_counter()
    bounds(problem)
    print(f"sensitivities of {len(problem.graph.groups)} groups: {perf_counter() - begin:.1f} s")
    dense = {"search_accuracy": problem.dense.accuracy, "test_accuracy": test_accuracy(task.network, task)}
    known = facts(settings) | {"dense": dense}
    for name, resource, budget in missing:
        at = replace(problem, resource=resource, value=budget)
        run_it = partial(measured, name, at, task, settings, known)
        cells.read_or_made(file_of(settings, name, resource, budget), facts(settings), run=run_it)
        print(f"{name} at {budget:g} of the {resource}: recorded", flush=True)


def figure(task: str, rows: Sequence[Row]) -> Figure:
    """Test accuracy against the share kept of each resource, after fine-tuning where there was one, else after the cut.

    Args:
        task: Its name.
        rows: Of one folder.
    """
    tuned = all(TUNED[1] in row for row in rows)
    drawn = Figure(figsize=(8.0, 3.8), layout="constrained", facecolor="white")
    resources = sorted({row["resource"] for row in rows})
    for axes, resource in zip(np.atleast_1d(drawn.subplots(1, len(resources), sharey=True)), resources, strict=True):
        axes.axhline(100 * rows[0]["dense"]["test_accuracy"], color=GREY, linestyle="--", linewidth=1.2, label="dense")
        for name, colour in COLOURS.items():
            mine = [row for row in rows if row["method"] == name and row["resource"] == resource]
            if not mine:
                continue
            shares = [row[resource] for row in mine]
            for key, style in (("test_accuracy", ":"), (TUNED[1], "-"))[: 1 + tuned]:
                label = name if key == TUNED[1] or not tuned else None
                values = [100 * row[key] for row in mine]
                axes.plot(shares, values, style, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        axes.set(xlabel=f"{resource} kept, share of the dense network's")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel("test accuracy, %")
    drawn.axes[0].legend(frameon=False, fontsize=8)
    dots = "; dotted: right after the cut" if tuned else ""
    tuning = f", fine-tuned (epochs: {rows[0]['fine_tune_epochs']})" if tuned else ""
    drawn.suptitle(f"{task}: cut once, recalibrated{tuning}{dots}", fontsize=10)
    return drawn


def main(settings: Settings) -> None:
    """Measure what is missing, print the table, draw it."""
    torch.set_num_threads(settings.threads)
    if not settings.only_print:
        measure_missing(settings)
    rows = rows_of(settings)
    if not rows:
        raise ValueError(f"{settings.out} holds no row that was measured")
    shown = [[_cell(row[column]) for column in columns(settings)] for row in rows]
    dense = rows[0]["dense"]
    show(
        f"{settings.task}, dense: search {dense['search_accuracy']:.4f}, test {dense['test_accuracy']:.4f}",
        [column.replace("fine_tuned", "tuned").removesuffix("_accuracy") for column in columns(settings)],
        shown,
    )
    if settings.picture is not None:
        settings.picture.parent.mkdir(parents=True, exist_ok=True)
        write(settings.picture, png(figure(settings.task, rows)))


def columns(settings: Settings) -> tuple[str, ...]:
    """What the table shows."""
    return COLUMNS + (TUNED if settings.fine_tune_epochs else ())


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
