"""Directional pruning for shaping: an extension of this project to Chao et al., NeurIPS 2020, not part of the paper.

gRDA ends with the weights that lie below its last threshold g_T at zero: what flat directions of the loss let go, for
free. On whole channels (`baselines.channel_grda`) that is a share q of each group. What a plan takes beyond it is not:

    Phi = -sum over groups of max(0, a - q) macs        a the pruned share, macs what the whole group's channels cost

A network that was trained so (`directional_pruning.structured`) has its dead channels, and q is their share. Without
training no dual moves from the weights that it starts from, so q is the share of channels whose norm is below the
threshold that `channel_grda.closed_form` would aim at: a guess from sizes, which knows nothing of curvature.
"""

from __future__ import annotations

import numpy as np

from baselines.channel_grda import bundles, closed_form, norms
from baselines.method import Scores
from baselines.potential import Curve
from prune_env.envs.dynamics import Problem

SHARE, MU, TARGET = 0.4, 0.55, "scales"
"""Share of all channels below the threshold, growth of the threshold, what is thresholded: the extension's defaults."""


def free_shares(there: Scores, *, share: float = SHARE) -> dict[str, float]:
    """The share q of each group.

    Args:
        there: Group name -> norm of each channel.
        share: Of all channels, that the threshold is to be above; not read where channels are dead already.
    """
    every = np.concatenate([*there.values()])
    # after one step at rate 1 the threshold is c itself
    threshold = 0.0 if (every == 0).any() else closed_form(every, share=share, rates=[1.0], mu=MU)
    return {name: float(np.mean(norm <= threshold)) for name, norm in there.items()}


def excess(channels: int, *, free: float, macs: float) -> Curve:
    """-max(0, a - q) macs of one group by the number of channels kept."""
    pruned = 1 - np.arange(channels + 1) / channels
    return -np.maximum(0.0, pruned - free) * macs


def beyond_free(problem: Problem) -> dict[str, Curve]:
    """For shaping: what each group loses beyond its free directions, by count."""
    graph, network = problem.graph, problem.evaluator.network
    free = free_shares(norms(network, bundles(network, graph, problem.evaluator.calibration[:1], target=TARGET)))
    cost, without = graph.cost["macs"], graph.full * (1 - np.eye(len(graph.groups), dtype=np.int64))
    macs = cost(graph.full) - cost(without)
    pairs = zip(graph.groups, macs, strict=True)
    return {group.name: excess(group.channels, free=free[group.name], macs=float(own)) for group, own in pairs}
