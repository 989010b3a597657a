"""Episodes and a whole search against the bare forward passes of the same cut networks on the same images.

Every network that an episode cuts and measures is measured a second time by nothing but its forward passes: the
calibration images in training mode where the network is recalibrated, then the search images. Both take turns within
one run. What is left is the price of deciding, cutting, refitting and, in a search, of learning.

    python -m benchmarks.episode
    python -m benchmarks.episode --task cifar10-resnet20 --weights FILE.safetensors
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from agents.config import TrainConfig
from agents.record import RunFolder
from agents.rounds import make_workers
from agents.search import search
from benchmarks.subjects import random_images
from benchmarks.timing import show
from prune_env.config import make_problem, make_task, problem_from
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem
from prune_env.number_format import autocast
from prune_env.pruning.evaluator import Evaluator
from prune_env.pruning.measure import Measurement, prepare_images
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.tasks.networks import make_network

BATCH_SIZE = 250


@dataclass(frozen=True)
class Settings:
    """Episodes against bare forward passes."""

    task: str | None = None
    """Task name; none takes resnet20 with random weights on random images, which needs no data."""
    weights: str | None = None
    """Weights of the task's network."""
    budget: float = 0.5
    """Share of the macs."""
    episodes: int = 40
    """Episodes of random actions, and of the search."""
    algorithm: str = "td3"
    """Who learns in the search."""
    refit: tuple[str, ...] = ("none", "auto")
    """Refits to measure with."""
    calibration_images: int = 512
    """Images for recalibration."""
    search_images: int = 2000
    """Images that plans are measured on, without a task."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


class Twin:
    """An evaluator that also runs the bare forward passes of every network that it measures.

    Attributes:
        bare: Seconds of bare forward passes.
        aside: Seconds that the episode would not have taken: all that is done for the bare passes.
    """

    def __init__(self, evaluator: Evaluator, *, calibration: Tensor, search: Tensor) -> None:
        self.evaluator = evaluator
        sizes = len(calibration) // -(-len(calibration) // BATCH_SIZE), BATCH_SIZE  # as the evaluator deals them
        self.calibration, self.search = (
            prepare_images(images, device="cpu", dtype=evaluator.meter.dtype).split(size)
            for images, size in zip((calibration, search), sizes, strict=True)
        )
        self.bare = self.aside = 0.0

    def __getattr__(self, name: str) -> Any:
        """Everything else is the evaluator's own."""
        return getattr(self.evaluator, name)

    def measure(self, plan: Plan) -> Measurement:
        """Measure twice; the second time for the clock alone. What the evaluator remembers runs no network at all."""
        known = self.evaluator.evaluations
        measured = self.evaluator.measure(plan)
        begin = perf_counter()
        if self.evaluator.evaluations > known:
            self._measure_bare(plan)
        self.aside += perf_counter() - begin
        return measured

    def _measure_bare(self, plan: Plan) -> None:
        network = cut(self.evaluator.network, self.evaluator.graph, plan).eval().to(memory_format=torch.channels_last)
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        begin = perf_counter()
        with torch.inference_mode(), autocast("cpu", self.evaluator.meter.dtype):
            if norms and self.evaluator.recalibrate:
                self._forward(network, norms, self.calibration, training=True)
            self._forward(network, norms, self.search, training=False)
        self.bare += perf_counter() - begin

    @staticmethod
    def _forward(network: nn.Module, norms: list[_BatchNorm], batches: tuple[Tensor, ...], *, training: bool) -> None:
        for norm in norms:
            norm.training = training
        for batch in batches:
            network(batch)


def subject(settings: Settings, refit: str) -> tuple[Problem, Twin]:
    """The problem, with its evaluator replaced by a twin."""
    options = {"budget": settings.budget, "refit": refit}
    if settings.task is None:
        calibration = random_images(settings.calibration_images, seed=0)
        held_out = random_images(settings.search_images, seed=1)
        problem = problem_from(
            make_network("resnet20", classes=10), calibration=calibration, search=held_out, name="resnet20", **options
        )
    else:
        task = make_task(settings.task, weights=settings.weights)
        calibration, held_out = task.calibration(settings.calibration_images), task.search.take(len(task.search))
        problem = make_problem(task, calibration_images=settings.calibration_images, **options)
    twin = Twin(problem.evaluator, calibration=calibration[0], search=held_out[0])
    return replace(problem, evaluator=twin), twin


def play(problem: Problem, episodes: int, *, first: int) -> None:
    """Episodes of random actions."""
    env = ChannelPruningEnv(problem=problem)
    env.action_space.seed(first)
    for _ in range(episodes):
        env.reset()
        done = False
        while not done:
            _, _, done, _, _ = env.step(env.action_space.sample())


def learn(problem: Problem, settings: Settings) -> None:
    """A whole search, with its records and checkpoints."""
    config = TrainConfig(budget=settings.budget, algorithm=settings.algorithm, episodes=settings.episodes)
    with tempfile.TemporaryDirectory() as folder, closing(make_workers(problem, config.env(), workers=1)) as venv:
        search(problem, config, venv, RunFolder.create(Path(folder) / "run", config))


def measure(settings: Settings, refit: str) -> list[list[str]]:
    """Two rows of the table: the environment alone, and a search."""
    problem, twin = subject(settings, refit)
    play(problem, 2, first=0)  # to warm up
    rows = []
    for name, run in (
        ("random actions", lambda: play(problem, settings.episodes, first=1)),
        (f"search, {settings.algorithm}", lambda: learn(problem, settings)),
    ):
        twin.bare = twin.aside = 0.0
        begin = perf_counter()
        run()
        whole = perf_counter() - begin - twin.aside
        each = [f"{seconds / settings.episodes * 1e3:.0f}" for seconds in (whole, twin.bare)]
        rows.append([f"{name}, refit {refit}", *each, f"{whole / twin.bare:.3f}"])
    return rows


def main(settings: Settings) -> None:
    """Time and print the table."""
    torch.set_num_threads(settings.threads)
    show(
        f"{settings.task or 'resnet20 on random images'}, budget {settings.budget}: {settings.episodes} episodes, "
        f"{settings.threads} threads",
        ["", "episode, ms", "bare forward passes, ms", "ratio"],
        [row for refit in settings.refit for row in measure(settings, refit)],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
