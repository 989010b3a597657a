"""How fast networks are fine-tuned, and how much of it is spent on reading and augmenting images.

Dense and cut uniformly to shares of the macs, by the task's usual recipe. Images per second of CPU time say what a core
of a quiet machine does, nearly (what shares a cache still slows them down); those of wall time what this one did.

    python -m benchmarks.training_speed --task cifar10-resnet20 --weights FILE.safetensors
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import tyro
from torch import nn

from benchmarks.lasting.study import timed
from benchmarks.timing import show, uniform_plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.dense import recipe
from prune_env.tasks.images import Split
from prune_env.tasks.task import make_task
from prune_env.tasks.training import TrainSettings, train_steps
from prune_env.tasks.training.augmentation import augment


@dataclass(frozen=True)
class Settings:
    """How fast networks are fine-tuned."""

    task: str = "digits-cnn"
    """Task name."""
    weights: str | None = None
    """File with the dense weights; random ones without it."""
    budgets: tuple[float, ...] = (1.0, 0.5, 0.35)
    """Shares of the macs."""
    steps: int = 40
    """Steps that are timed, after a few to warm up."""
    threads: int = 1
    """CPU threads."""


def read(split: Split, settings: TrainSettings, steps: int) -> None:
    """Images as training reads them, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        positions = torch.randint(len(split), (settings.batch_size,), generator=generator)
        pixels = augment(split.pixels(positions), crop=settings.crop, flip=settings.flip, generator=generator)
        split.normalise(pixels).contiguous(memory_format=torch.channels_last)


def main(settings: Settings) -> None:
    """Time everything and print the table."""
    torch.set_num_threads(settings.threads)
    task = make_task(settings.task, weights=settings.weights, epochs=0)
    graph = trace(task.network, task.example)
    own = recipe(task.data, task.network_name, seed=0, threads=settings.threads)
    images = settings.steps * own.batch_size

    def trained(network: nn.Module, steps: int) -> None:
        train_steps(network, task.train, steps=steps, settings=own)

    rows = []
    for budget in settings.budgets:
        small = cut(task.network, graph, uniform_plan(graph, budget)) if budget < 1 else copy.deepcopy(task.network)
        trained(small.requires_grad_(True), 3)
        rows.append((f"training at {budget:g} of the macs", timed(lambda net=small: trained(net, settings.steps))[1]))
    read(task.train, own, 3)
    rows.append(("reading and augmenting alone", timed(lambda: read(task.train, own, settings.steps))[1]))
    show(
        f"{task.name}, batches of {own.batch_size}, {own.dtype}, threads: {settings.threads}",
        ["what", "images/s of CPU time", "images/s of wall time"],
        [[name, *(f"{images / cost[clock]:,.0f}" for clock in ("cpu_s", "wall_s"))] for name, cost in rows],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
