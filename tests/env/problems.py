"""Hand-made decision problems: a layer graph of given sizes, and an evaluator that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prune_env.envs import observation
from prune_env.envs.dynamics import Problem, open_steps
from prune_env.envs.reward import REWARDS
from prune_env.pruning.graph import Cost, Group, Layer, LayerGraph, Slot
from prune_env.pruning.measure import Measurement
from prune_env.pruning.plan import Plan


def chain(channels: Sequence[int], *, positions: int = 2, residual: bool = False) -> LayerGraph:
    """1x1 convolutions one after another, from 3 inputs to 5 outputs, without bias.

    With n_i channels kept in group i, macs = positions * params and
    params = 3 n_0 + n_0 n_1 + ... + n_last * 5; `residual` adds a layer from the first group to itself, n_0^2.
    """
    last, groups = len(channels), len(channels)
    reads = [None, *range(last)]
    writes = [*range(last), None]
    if residual:
        reads, writes = [*reads, 0], [*writes, 0]
    offset = np.zeros((2, len(reads)))
    slope = np.zeros((2, groups, len(reads)))
    for term, (read, write) in enumerate(zip(reads, writes, strict=True)):
        for side, group, size in ((0, read, 3), (1, write, 5)):
            if group is None:
                offset[side, term] = size
            else:
                slope[side, group, term] = 1
    params = Cost(0.0, np.ones(len(reads)), offset, slope)
    macs = Cost(0.0, np.full(len(reads), float(positions)), offset, slope)
    sizes = [3, *channels, 5]
    layers = tuple(
        Layer(f"conv{i}", "conv", positions, (1, 1), (1, 1), sizes[i], sizes[i + 1], 1) for i in range(last + 1)
    )
    every = [np.arange(n) for n in channels]
    found = tuple(
        Group(
            f"conv{i}",
            n,
            (Slot(f"conv{i}", "out", every[i], every[i]),),
            (),
            (Slot(f"conv{i + 1}", "in", every[i], every[i]),),
        )
        for i, n in enumerate(channels)
    )
    return LayerGraph(found, {f"conv{last}": "the network's output"}, layers, {"macs": macs, "params": params})


@dataclass(eq=False)
class Pretender:
    """Measures nothing: accuracy is the mean share of channels kept."""

    graph: LayerGraph
    seen: list[Plan] = field(default_factory=list)

    def measure(self, plan: Plan) -> Measurement:
        """A made-up measurement with the true macs and params."""
        self.seen.append(plan)
        share = float(np.mean(self.graph.counts(plan) / self.graph.full))
        return Measurement(share, 2.0 - share, self.graph.macs(plan), self.graph.params(plan))


def problem_of(
    graph: LayerGraph,
    *,
    budget: float = 0.5,
    resource: str = "macs",
    reward: str = "accuracy",
    limits: dict[str, Any] | None = None,
    **options: Any,
) -> Problem:
    """A problem over a graph with made-up scores; `limits` goes to `open_steps`."""
    steps, allowed = open_steps(graph, **(limits or {}))
    draw = np.random.default_rng(0)
    scores = {group.name: draw.random(group.channels) for group in graph.groups}
    fields = observation.describe(
        graph,
        steps,
        scores=scores,
        activations={group.name: draw.random((7, group.channels)) for group in graph.groups},
        curves={group.name: np.linspace(1, 0, observation.KNOWN["error_curve"]) for group in graph.groups},
    )
    return Problem(
        name="toy",
        graph=graph,
        resource=resource,
        steps=steps,
        allowed=allowed,
        dense=Measurement(0.9, 0.3, int(graph.cost["macs"](graph.full)), int(graph.cost["params"](graph.full))),
        scores=scores,
        fields=fields,
        evaluator=Pretender(graph),
        reward=REWARDS[reward],
        value=budget,
        **options,
    )
