"""Gated networks for tests: the small networks that can carry gates, and gates that are no longer fresh."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from prune_env.pruning.gating.layer import Decide, Question
from prune_env.pruning.gating.network import GatedNetwork, attach
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from tests.env import small_networks
from tests.env.graphs import traced
from tests.env.small_networks import example


class Joined(nn.Module):
    """Three branches, one without a norm, one without a bias either, one whose norm has no scale, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bare = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.normed, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.join = nn.Conv2d(15, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.plain(x), self.bare(x), self.norm(self.normed(x))], 1).relu()
        return self.head(F.max_pool2d(self.join(x).relu(), 2).flatten(1))


GATEABLE = (
    "chain", "residual", "paddedshortcut", "depthwise", "shuffled", "normalised", "attention", "spatialattention",
    "joined",
)  # fmt: skip


def build(name: str) -> nn.Module:
    """The network of that name with random weights and BatchNorm statistics, in eval mode; input 3x8x8."""
    if name != "joined":
        return small_networks.build(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Joined()
        nn.init.uniform_(network.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(network.norm.running_var, 0.5, 2.0)
    return network.eval()


@cache
def graph_of(name: str) -> LayerGraph:
    """Its graph."""
    return trace(build(name), example()) if name == "joined" else traced(name)


@cache
def _fresh(name: str, static: str) -> GatedNetwork:
    return attach(build(name), graph_of(name), example(), static=static)


def fresh(name: str, static: str = "vector") -> GatedNetwork:
    """The network just after its gates were attached."""
    return copy.deepcopy(_fresh(name, static))


def trained(name: str, seed: int = 0, static: str = "vector") -> GatedNetwork:
    """The same with gates, shifts and static scores that have moved, as a training would move them."""
    gated, generator = fresh(name, static), torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, deviation: float) -> torch.Tensor:
        return deviation * torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for layer in gated.layers:
            layer.gate.weight += noise(layer.gate.weight, 0.05)
            layer.gate.bias += noise(layer.gate.bias, 0.3)
            layer.shift += noise(layer.shift, 0.3)
            layer.sight.running_mean += noise(layer.sight.running_mean, 0.5)
            layer.sight.running_var.fill_(0.4)
        for parameter in gated.static.parameters():
            parameter += noise(parameter, 0.5 if static == "vector" else 0.1)
    return gated


def random_plan(gated: GatedNetwork, seed: int) -> Plan:
    """Some channels of each gated group."""
    generator = np.random.default_rng(seed)
    return Plan({
        name: tuple(generator.permutation(channels)[: generator.integers(1, channels + 1)].tolist())
        for name, channels in zip(gated.names, gated.full.tolist(), strict=True)
    })  # fmt: skip


def random_masks(gated: GatedNetwork, samples: int, seed: int = 0, keep: float = 0.6) -> dict[str, torch.Tensor]:
    """Active channels of each gated layer, different for each sample, at least one of them."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, channels in zip(gated.names, gated.full.tolist(), strict=True):
        masks[name] = torch.rand(samples, channels, generator=generator) < keep
        masks[name][~masks[name].any(1), 0] = True
    return masks


def by_masks(masks: dict[str, torch.Tensor]) -> Decide:
    """Decisions that are looked up."""

    def decide(question: Question) -> torch.Tensor:
        return masks[question.name]

    return decide


def by_plan(plan: Plan) -> Decide:
    """The channels of a plan for every sample."""

    def decide(question: Question) -> torch.Tensor:
        active = torch.zeros_like(question.runtime, dtype=torch.bool)
        active[:, list(plan.keep[question.name])] = True
        return active

    return decide
