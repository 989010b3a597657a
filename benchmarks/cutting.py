"""Cutting a network for one episode: index tables derived once, against Torch-Pruning alone at the same shares.

Both sides start from the whole network. Ours: a new random choice of channels for every cut, from scores to plan, and
the `Cutter` that an evaluator holds; what that looks up once per network has a column of its own. Torch-Pruning's:
deep copy, `MagnitudePruner`, `step` (it ranks channels by magnitude itself, and traces anew in every episode). The
layers that one side leaves whole are left whole by the other.

    python -m benchmarks.cutting
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
import torch_pruning
import tyro
from torch import nn

from benchmarks.timing import random_scores, show, take_turns
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import count_macs
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import Cutter
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network

REPEATS = 5
"""Cuts per timed round: one alone is too short for the clock of a machine that has just done something else."""

NETWORKS = {
    "resnet20": 32,
    "vgg16_bn": 32,
    "torchvision:resnet18": 224,
    "torchvision:resnet50": 224,
}
"""Network -> side of its input."""


@dataclass(frozen=True)
class Settings:
    """Cutting against Torch-Pruning."""

    rounds: int = 15
    """Timed rounds per network; the medians are shown."""
    keep: float = 0.5
    """Share of channels kept in every group."""
    threads: int = 1
    """CPU threads: with more, what else runs on the machine shows in the times."""


def ours(cutter: Cutter, graph: LayerGraph, keep: float, scores: dict[str, np.ndarray]) -> nn.Module:
    """The cut network of an episode: a plan from counts and known scores, then the surgery."""
    counts = np.maximum(1, graph.full - (graph.full * (1 - keep)).astype(np.int64))
    return cutter.cut(Plan.of_counts(graph, counts, scores))


def ours_in_a_row(cutter: Cutter, graph: LayerGraph, keep: float, choices: Iterable[dict[str, np.ndarray]]) -> None:
    """Some episodes after one another; each network is gone before the next, as in a search."""
    for scores in choices:
        ours(cutter, graph, keep, scores)


def theirs(network: nn.Module, graph: LayerGraph, keep: float, example: torch.Tensor) -> nn.Module:
    """The same with Torch-Pruning alone."""
    small = copy.deepcopy(network)
    modules = dict(small.named_modules())
    pruner = torch_pruning.pruner.MagnitudePruner(
        small,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=1 - keep,
        ignored_layers=[modules[name] for name in graph.fixed],
    )
    pruner.step()
    return small


def measure(name: str, side: int, settings: Settings) -> list[str]:
    """One row of the table."""
    network = make_network(name, classes=10 if side == 32 else 1000, side=side)
    example = torch.randn(1, 3, side, side)
    graph = trace(network, example)
    begin = perf_counter()
    cutter = Cutter(network, graph)
    prepared = perf_counter() - begin
    choices = [
        [random_scores(graph, turn * REPEATS + i) for i in range(REPEATS)] for turn in range(settings.rounds + 1)
    ]
    seconds = take_turns(
        settings.rounds,
        {
            "ours": lambda turn: ours_in_a_row(cutter, graph, settings.keep, choices[turn]),
            "theirs": lambda _: theirs(network, graph, settings.keep, example),
            # Not shown. Without it, reference cycles that one side leaves behind are collected in the other's time.
            "collection": lambda _: gc.collect(),
        },
    )
    dense = count_macs(network, example)
    macs = [
        count_macs(small, example) / dense
        for small in (ours(cutter, graph, settings.keep, choices[0][0]), theirs(network, graph, settings.keep, example))
    ]
    mine, other = float(np.median(seconds["ours"])) / REPEATS, float(np.median(seconds["theirs"]))
    times = f"{prepared * 1e3:.1f}", f"{mine * 1e3:.2f}", f"{other * 1e3:.0f}", f"{other / mine:.0f}x"
    return [name, *times, *(f"{m:.3f}" for m in macs)]


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    show(
        f"Cutting for one episode, keep {settings.keep} in every group "
        f"(median of {settings.rounds}, {settings.threads} thread)",
        ["network", "once, ms", "cut, ms", "Torch-Pruning, ms", "faster", "macs left", "macs left (T-P)"],
        [measure(name, side, settings) for name, side in NETWORKS.items()],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
