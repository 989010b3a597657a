"""float32 against bfloat16: a step of training, and evaluation, of networks for images of 32 x 32.

Which one is faster is up to the machine; `auto` trainings and all measurements take what `fast_format` says, which is
marked in the title.

    python -m benchmarks.number_formats
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import nn

from benchmarks.timing import show, take_turns
from prune_env.number_format import FORMATS, autocast, fast_format
from prune_env.pruning.measure import Meter
from prune_env.tasks.networks import make_network


@dataclass(frozen=True)
class Settings:
    """float32 against bfloat16."""

    networks: tuple[str, ...] = ("resnet20", "m-cifarnet")
    """Networks of the zoo."""
    images: int = 125
    """Images of a batch."""
    rounds: int = 5
    """Timed rounds; the medians are shown."""
    threads: int = 1
    """CPU threads."""


def step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> None:
    """Forward and backward pass of a training step."""
    network.train()
    with autocast("cpu", dtype):
        logits = network(images)
    nn.functional.cross_entropy(logits.float(), labels).backward()
    network.zero_grad()


def measure(name: str, settings: Settings) -> list[list[str]]:
    """Two rows of the table."""
    network = make_network(name, classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(settings.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    laid_out, labels = images.contiguous(memory_format=torch.channels_last), torch.zeros(len(images), dtype=torch.long)
    meters = {name: Meter(images, labels, dtype=dtype) for name, dtype in FORMATS.items()}
    work = {
        "training step": {
            name: lambda _, dtype=dtype: step(network, laid_out, labels, dtype) for name, dtype in FORMATS.items()
        },
        "evaluation": {name: lambda _, meter=meter: meter.accuracy_and_loss(network) for name, meter in meters.items()},
    }
    rows = []
    for what, candidates in work.items():
        medians = {name: float(np.median(taken)) for name, taken in take_turns(settings.rounds, candidates).items()}
        rates = [f"{settings.images / medians[name]:,.0f}" for name in FORMATS]
        rows.append([f"{name}, {what}", *rates, f"{medians['bfloat16'] / medians['float32']:.2f}"])
    return rows


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    torch.set_num_threads(settings.threads)
    fast = str(fast_format("cpu")).removeprefix("torch.")
    show(
        f"Images a second, batches of {settings.images}, threads: {settings.threads}; taken for fast here: {fast}",
        ["network", *FORMATS, "time, bfloat16 / float32"],
        [row for name in settings.networks for row in measure(name, settings)],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
