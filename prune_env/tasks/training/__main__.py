"""Command line: train a task's dense network, or take up a training that was stopped, and cache the result."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Annotated

import torch
import tyro
from rich.console import Console
from torch import nn

from prune_env.tasks.dense import blank, train_dense
from prune_env.tasks.images import Split
from prune_env.tasks.progress import progress_bar
from prune_env.tasks.training import TrainingDiverged


@dataclass(frozen=True)
class Arguments:
    """Train the dense network of a task. The same command goes on where a stopped one was."""

    task: str = "digits-cnn"
    """Task name, <data>-<network>."""
    network: str | None = None
    """Other network than the task's: a zoo name, torchvision:NAME or package.module:factory."""
    normalise: str | None = None
    """Name of a normalisation, or numbers: means, then standard deviations."""
    seed: int = 0
    """Seed of splits, initial weights, order and augmentation."""
    root: str | None = None
    """Data root; otherwise $PRUNE_ENV_DATA or the user's cache."""
    search_size: int | None = None
    """Images held out of the training set."""
    image_size: int | None = None
    """Side to which image files are scaled, in pixels."""
    start: str | None = None
    """File with the weights to start from, a safetensors file or a state dict; random ones by default."""
    epochs: int | None = None
    """Passes over the training split."""
    lr: float | None = None
    """Peak learning rate."""
    batch_size: int | None = None
    """Images per step."""
    momentum: float | None = None
    """Nesterov momentum."""
    weight_decay: float | None = None
    """L2 decay of all parameters."""
    label_smoothing: float | None = None
    """Share of the target spread over all classes."""
    crop: int | None = None
    """Pixels of padding for random crops."""
    flip: Annotated[bool | None, tyro.conf.FlagConversionOff] = None
    """Mirror images at random."""
    dtype: str | None = None
    """Precision of the forward pass: bfloat16, float32, or auto, the one that is fast here."""
    threads: int | None = None
    """CPU threads; 0 takes torch's own setting."""


def run(arguments: Arguments) -> None:
    """Train, and say where the weights are.

    Raises:
        ValueError: A name or value that is not allowed, or a corrupt file.
        OSError: Missing data, or a cache that cannot be written.
        TrainingDiverged: The loss became NaN or Inf.
    """
    options = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
    start = blank(options.pop("task"), **options)
    with progress_bar(f"{start.settings.data}-{start.settings.network}") as progress:
        file = train_dense(start, progress=progress)
    console = Console(soft_wrap=True)
    console.print(f"accuracy on the search split: {accuracy(start.network, start.splits.search):.4f}")
    console.print(str(file), highlight=False)


def accuracy(network: nn.Module, split: Split) -> float:
    """Share of a split's images that a network gets right, in [0, 1]."""
    with torch.inference_mode():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in split.batches(500))
    return right / len(split)


def main() -> None:
    """Entry point; exit code 2 for bad input, 1 for a training that diverged, 130 when interrupted."""
    problem, code = "", 0
    try:
        run(tyro.cli(Arguments, prog="python -m prune_env.tasks.training"))
    except (ValueError, OSError) as error:
        problem, code = str(error), 2
    except TrainingDiverged as error:
        problem, code = str(error), 1
    except KeyboardInterrupt:
        problem, code = "stopped; the same command goes on from the last epoch", 130
    if code:
        sys.stderr.write(f"error: {' '.join(problem.split())}\n")
        sys.exit(code)


if __name__ == "__main__":
    main()
