"""A step that does not end the episode: what deciding costs beside measuring.

python -m benchmarks.step
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
import tyro

from benchmarks.subjects import random_problem
from benchmarks.timing import show
from prune_env.envs.channel_pruning import ChannelPruningEnv


@dataclass(frozen=True)
class Settings:
    """Microseconds per non-terminal step."""

    networks: tuple[str, ...] = ("resnet20", "resnet56", "resnet110")
    """Networks for images of 32 x 32."""
    episodes: int = 30
    """Episodes of random actions; none is played to its measured end."""
    budget: float = 0.5
    """Share of the macs that an episode may use."""


def measure(name: str, settings: Settings) -> list[str]:
    """One row of the table."""
    env = ChannelPruningEnv(random_problem(name, calibration=64, search=64, budget=settings.budget))
    env.action_space.seed(0)
    steps = len(env.problem.steps) - 1
    seconds = []
    for _ in range(settings.episodes):
        env.reset()
        for action in [env.action_space.sample() for _ in range(steps)]:
            begin = perf_counter()
            env.step(action)
            seconds.append(perf_counter() - begin)
    quartiles = np.quantile(seconds, [0.25, 0.5, 0.75]) * 1e6
    return [name, str(steps + 1), *(f"{value:.0f}" for value in (quartiles[1], quartiles[0], quartiles[2]))]


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    torch.set_num_threads(1)
    show(
        f"A step that does not end the episode ({settings.episodes} episodes of random actions)",
        ["network", "groups", "median, us", "25 %, us", "75 %, us"],
        [measure(name, settings) for name in settings.networks],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
