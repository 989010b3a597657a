"""Neuron Merging at the authors' widths: pruned and merged, and whether merging still helps after recalibration.

Each layer keeps the published number of channels; nothing is fine-tuned or refitted. Recalibration re-estimates
BatchNorm on training images without labels; the paper has none. Without weights the network is trained here, or taken
from the cache.

    python -m benchmarks.merging_widths --task cifar10-vgg16_bn --epochs 12
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import prune_env
from baselines import METHODS, Method, prune
from baselines.neuron_merging import published_widths
from benchmarks.timing import show
from prune_env.tasks.progress import progress_bar
from prune_env.tasks.task import Task

REPORTED = {"l1": (88.70, 93.16), "l2": (89.14, 93.16), "geometric_median": (87.85, 93.10)}
"""Criterion -> VGG-16 on CIFAR-10, test accuracy in per cent, pruned and merged (the authors' README; base 93.70)."""

METHODS_AT_WIDTHS: dict[str, Method] = {
    name: replace(METHODS[method], allocate=published_widths)
    for name, method in {"pruned": "uniform", "merged": "neuron_merging"}.items()
}


@dataclass(frozen=True)
class Settings:
    """The table of the published widths."""

    task: str = "cifar10-vgg16_bn"
    """Task name; one for which widths are published."""
    weights: Path | None = None
    """File with the dense weights."""
    epochs: int | None = None
    """Epochs of a training without weights; none takes the usual number."""
    criteria: tuple[str, ...] = tuple(REPORTED)
    """Importances that choose the channels."""
    threads: int = 0
    """CPU threads; 0 takes torch's own setting."""


def measure(task: Task, *, criterion: str, recalibrate: bool) -> dict[str, prune_env.Measurement]:
    """Test measurements, pruned and merged."""
    return {
        name: prune(method, task, budget=1.0, importance=criterion, recalibrate=recalibrate, refit=False).test
        for name, method in METHODS_AT_WIDTHS.items()
    }


def row(task: Task, criterion: str) -> list[str]:
    """One row of the table."""
    plain, again = (measure(task, criterion=criterion, recalibrate=recalibrate) for recalibrate in (False, True))
    cells = [100 * one.accuracy for found in (plain, again) for one in found.values()]
    pruned, merged = REPORTED.get(criterion, ("-", "-"))
    return [criterion, *(f"{cell:.2f}" for cell in cells), f"{pruned} -> {merged}"]


def main(settings: Settings) -> None:
    """Measure everything and print the table."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with progress_bar(settings.task) as tell:
        task = prune_env.make_task(settings.task, weights=settings.weights, epochs=settings.epochs, progress=tell)
    whole = prune("uniform", task, keep=1.0, recalibrate=False, refit=False).test
    small = measure(task, criterion="l1", recalibrate=False)["pruned"]
    show(
        f"{task.name}, test accuracy in %: {100 * whole.accuracy:.2f} whole; {small.params / whole.params:.1%} of the "
        f"params and {small.macs / whole.macs:.1%} of the macs kept",
        ["criterion", "pruned", "merged", "pruned, recalibrated", "merged, recalibrated", "published"],
        [row(task, criterion) for criterion in settings.criteria],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
