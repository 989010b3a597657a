"""Tasks that a user makes of a network and data of his own: small networks, random pixels, random labels."""

from __future__ import annotations

import torch

from prune_env.tasks.images import ArrayImages, Split
from prune_env.tasks.normalisation import parse
from prune_env.tasks.task import Task
from tests.env.small_networks import build, example


def split(number: int, seed: int) -> Split:
    """Random 8x8 pixels with random labels of five classes."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (number, 3, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.randint(5, (number,), generator=draw)
    return Split(ArrayImages(pixels), torch.arange(number), labels, 5, parse("half", channels=3))


def own_task(network: str) -> Task:
    """A task of one of the small networks."""
    return Task(
        name=f"own-{network}",
        network=build(network),
        example=example(),
        train=split(96, 1),
        search=split(64, 2),
        test=split(80, 3),
        classes=5,
        normalise=parse("half", channels=3),
        seed=0,
        data="own",
        network_name=network,
        weights=None,
        settings={},
    )
