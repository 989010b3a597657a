"""A rollout of `prune_env/RuntimePruning-v0`: what deciding costs beside computing, and what a batch saves.

The rollout of a batch with random actions takes turns with the bare gated forward pass of the same images with the
same masks given, and with the environment of one image at a time. `gain` is how many times more images per second the
batch walks through; `forward's` is how much the bare forward pass alone gains from a batch. Networks have random
weights, on random images.

    python -m benchmarks.rollout
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.timing import show, take_turns
from prune_env.envs.runtime_dynamics import Passage, RuntimeProblem, Scale
from prune_env.envs.runtime_pruning import RuntimePruningEnv, RuntimePruningVectorEnv
from prune_env.number_format import autocast, number_format
from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.network import attach
from prune_env.pruning.gating.walk import Walker, answer
from prune_env.pruning.measure import prepare_images
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network

SHAPES = {"cnn": (1, 8)}
"""Image channels and side; those of CIFAR-10 for networks not named. Digits run in float32, as in their task."""


@dataclass(frozen=True)
class Settings:
    """Milliseconds of a rollout, and images per second."""

    networks: tuple[str, ...] = ("m-cifarnet", "resnet20", "cnn")
    """Networks of the zoo."""
    images: int = 128
    """Images that walk together."""
    alone: int = 4
    """Images in a round that walk one by one."""
    rounds: int = 9
    """Rounds to time."""
    trust: float = 0.5
    """Trust in the runtime decision."""


def problem_of(network: str, settings: Settings) -> RuntimeProblem:
    """Gates that differ from image to image."""
    generator = torch.Generator().manual_seed(0)
    channels, side = SHAPES.get(network, (3, 32))
    images = torch.randn(settings.images, channels, side, side, generator=generator)
    dense = make_network(network, classes=10, channels=channels, side=side).eval()
    dtype = number_format(dense, images)
    gated = attach(dense, trace(dense, images[:1]), images[:1]).to(memory_format=torch.channels_last).eval()
    with torch.no_grad():
        for layer in gated.layers:
            layer.gate.weight.normal_(std=0.05, generator=generator)
    prepared = prepare_images(images, device="cpu", dtype=dtype)
    return RuntimeProblem(
        name=network,
        gated=gated,
        images=prepared,
        labels=torch.randint(10, (settings.images,), generator=generator),
        scale=Scale.of(Walker(gated), prepared, dtype),
        trust=settings.trust,
        dtype=dtype,
    )


def masks_of(problem: RuntimeProblem, actions: np.ndarray) -> list[Tensor]:
    """Active channels `[images, channel]` of each layer under some actions."""
    passage, masks = Passage(problem, problem.budget_of(problem.value), len(problem.images)), []

    def decide(question: Question) -> Tensor:
        runtime, static = actions[question.index].T
        masks.append(passage.decide(question, runtime, float(static.mean())))
        return masks[-1]

    with torch.no_grad(), autocast("cpu", problem.dtype):
        answer(problem.walker.walk(problem.images), decide)
    return masks


def measure(network: str, settings: Settings) -> list[str]:
    """One row of the table."""
    problem = problem_of(network, settings)
    batch, single = RuntimePruningVectorEnv(problem, num_envs=settings.images), RuntimePruningEnv(problem)
    actions = np.random.default_rng(0).random((len(problem.channels), settings.images, 2))
    masks = masks_of(problem, actions)
    batch.reset(seed=0)
    single.reset(seed=0)

    def rollout(turn: int) -> None:
        for action in actions:
            batch.step(action)

    def bare(images: int) -> None:
        problem.gated.decide = lambda question: masks[question.index][:images]
        with torch.inference_mode(), autocast("cpu", problem.dtype):
            problem.gated(problem.images[:images])

    def one_by_one(turn: int) -> None:
        for image in range(settings.alone):
            for action in actions[:, image]:
                single.step(action)
            single.reset()

    taken = take_turns(
        settings.rounds,
        {
            "rollout": rollout,
            "bare": lambda turn: bare(settings.images),
            "one by one": one_by_one,
            "bare, one image": lambda turn: bare(1),
        },
    )
    # Of each round apart: what slows the machine slows all of a round.
    ratio = np.quantile(taken["rollout"] / taken["bare"], [0.5, 0.25, 0.75])
    gain = np.median(taken["one by one"] / settings.alone / taken["rollout"]) * settings.images
    best = np.median(taken["bare, one image"] / taken["bare"]) * settings.images
    rates = [settings.images / np.median(taken["rollout"]), settings.alone / np.median(taken["one by one"])]
    times = [np.median(taken[name]) * 1e3 for name in ("bare", "rollout")]
    return [
        network,
        *(f"{time:.1f}" for time in times),
        f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})",
        *(f"{rate:,.0f}" for rate in rates),
        f"{gain:.1f}x",
        f"{best:.1f}x",
    ]


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    torch.set_num_threads(1)
    show(
        f"A rollout of {settings.images} images with random actions, one thread, {settings.rounds} rounds",
        ["network", "forward, ms", "rollout, ms", "ratio", "images/s", "one by one", "gain", "forward's"],
        [measure(name, settings) for name in settings.networks],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
