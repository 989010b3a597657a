"""What the benchmarks run on: a task by name, or a network of the zoo on random images, which needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_env.config import problem_from
from prune_env.envs.dynamics import Problem
from prune_env.tasks.networks import make_network


def random_images(count: int, *, seed: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Images `[count, 3, side, side]` from N(0, 1), and labels of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def random_problem(network: str, *, calibration: int, search: int, budget: float) -> Problem:
    """The decision problem of a network of the zoo, with random weights, on random images of 32 x 32."""
    return problem_from(
        make_network(network, classes=10),
        calibration=random_images(calibration, seed=0),
        search=random_images(search, seed=1),
        name=network,
        budget=budget,
    )
