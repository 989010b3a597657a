"""Cutting a network for one episode: index tables derived once, against Torch-Pruning alone at the same shares.

Both sides start from the whole network and a new random choice of channels in each round. Ours: scores to plan, and
`cut`. Torch-Pruning's: deep copy, `MagnitudePruner`, `step` (it ranks channels by magnitude itself, and traces anew in
every episode). The layers that one side leaves whole are left whole by the other.

    python -m benchmarks.cutting
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch_pruning
import tyro
from torch import nn

from benchmarks.timing import random_scores, show, take_turns
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import count_macs
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network

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

    rounds: int = 7
    """Timed rounds per network; the medians are shown."""
    keep: float = 0.5
    """Share of channels kept in every group."""
    threads: int = 1
    """CPU threads: with more, what else runs on the machine shows in the times."""


def ours(network: nn.Module, graph: LayerGraph, keep: float, turn: int) -> nn.Module:
    """The cut network for a new plan."""
    counts = np.maximum(1, graph.full - (graph.full * (1 - keep)).astype(np.int64))
    return cut(network, graph, Plan.of_counts(graph, counts, random_scores(graph, turn)))


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
    seconds = take_turns(
        settings.rounds,
        {
            "ours": lambda turn: ours(network, graph, settings.keep, turn),
            "theirs": lambda turn: theirs(network, graph, settings.keep, example),
        },
    )
    dense = count_macs(network, example)
    macs = [
        count_macs(small, example) / dense
        for small in (ours(network, graph, settings.keep, 0), theirs(network, graph, settings.keep, example))
    ]
    mine, other = (float(np.median(seconds[who])) for who in ("ours", "theirs"))
    return [name, f"{mine * 1e3:.2f}", f"{other * 1e3:.0f}", f"{other / mine:.0f}x", *(f"{m:.3f}" for m in macs)]


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    show(
        f"Cutting for one episode, keep {settings.keep} in every group "
        f"(median of {settings.rounds}, {settings.threads} thread)",
        ["network", "cut, ms", "Torch-Pruning, ms", "faster", "macs left", "macs left (T-P)"],
        [measure(name, side, settings) for name, side in NETWORKS.items()],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
