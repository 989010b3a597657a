"""Neuron Merging's table: LeNet-300-100 on Fashion-MNIST, pruned and merged, beside the published numbers.

The same share of both hidden layers is cut, and nothing is trained, refitted or recalibrated. The published numbers
are those of the authors' weights; for any others they are only the pattern to look for. Without weights the network is
trained here as the authors trained theirs, in one cycle instead of steps, or taken from the cache.

    python -m benchmarks.merging_table --weights FILE
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import prune_env
from baselines import prune
from benchmarks.timing import show
from prune_env.tasks.dense import blank, train_dense
from prune_env.tasks.task import Task

TASK = "fashion-mnist-lenet300100"
TRAINING = {"epochs": 60, "lr": 0.1, "weight_decay": 1e-4, "label_smoothing": 0.0, "crop": 0, "flip": False}
"""The authors' training, as far as it is known: no augmentation, and less decay than is usual here."""

PUBLISHED = {
    "l1": {0.5: (88.40, 88.69), 0.6: (85.17, 86.92), 0.7: (71.26, 82.75), 0.8: (66.76, 80.02)},
}
"""Criterion -> share cut -> test accuracy in per cent, pruned and merged (README of the authors' code); base 89.80."""


@dataclass(frozen=True)
class Settings:
    """The table of LeNet-300-100."""

    weights: Path | None = None
    """File with the dense weights."""
    root: Path | None = None
    """Data root; without it `$PRUNE_ENV_DATA` or the user's cache."""
    criteria: tuple[str, ...] = ("l1", "l2", "geometric_median")
    """Importances that choose the channels."""
    cuts: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    """Shares of the channels to cut."""
    threads: int = 1
    """CPU threads."""


def measure(task: Task, *, criterion: str, cut: float) -> tuple[float, float]:
    """Test accuracy in per cent, pruned and merged."""
    found = (
        prune(method, task, keep=1 - cut, importance=criterion, recalibrate=False, refit=False)
        for method in ("uniform", "neuron_merging")
    )
    pruned, merged = (round(100 * result.test.accuracy, 2) for result in found)
    return pruned, merged


def base(task: Task) -> float:
    """Test accuracy of the dense network in per cent."""
    return round(100 * prune("uniform", task, keep=1.0, recalibrate=False, refit=False).test.accuracy, 2)


def row(task: Task, criterion: str, cut: float) -> list[str]:
    """One row of the table."""
    pruned, merged = measure(task, criterion=criterion, cut=cut)
    published = PUBLISHED.get(criterion, {}).get(cut)
    reported = ["-", "-"] if published is None else [f"{value:.2f}" for value in published]
    return [
        criterion,
        f"{cut:.0%}",
        f"{pruned:.2f}",
        reported[0],
        f"{merged:.2f}",
        reported[1],
        f"{merged - pruned:+.2f}",
    ]


def main(settings: Settings) -> None:
    """Measure everything and print the table."""
    torch.set_num_threads(settings.threads)
    weights = settings.weights or train_dense(blank(TASK, root=settings.root, **TRAINING))
    task = prune_env.make_task(TASK, weights=weights, root=settings.root)
    show(
        f"LeNet-300-100 on Fashion-MNIST, test accuracy in %: {base(task):.2f} whole (published 89.80)",
        ["criterion", "cut", "pruned", "published", "merged", "published", "gain"],
        [row(task, criterion, cut) for criterion in settings.criteria for cut in settings.cuts],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
