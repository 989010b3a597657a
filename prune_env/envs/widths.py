"""What a plan's counts say by themselves: widths, bottlenecks and where the macs are. Costs nothing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from prune_env.pruning.graph import LayerGraph

WIDTHS = (
    "mean_keep", "min_keep", "min_channels", "log_widths", "log_params", "tilt",
    "macs_early", "macs_middle", "macs_late",
)  # fmt: skip
"""Names of the statistics."""


def widths(graph: LayerGraph, steps: tuple[int, ...], counts: Int[np.ndarray, " step"]) -> dict[str, float]:
    """Statistics of the channels kept in each step, of which higher may or may not be better.

    Args:
        graph: Of the whole network.
        steps: The groups that are decided, as positions in `graph.groups`; all others are whole.
        counts: Channels kept in each of them.

    Returns:
        `mean_keep`, `min_keep` (shares), `min_channels`, `log_widths` (sum of logarithms: the log of the product of
        widths), `log_params`, `tilt` (mean share of the last third of steps above that of the first), and
        `macs_early`, `macs_middle`, `macs_late`: what the thirds cost, as shares of the dense network's macs.
    """
    full = graph.full.copy()
    full[list(steps)] = counts
    shares = np.asarray(counts) / graph.full[list(steps)]
    # Each third has at least one step, where there are that many.
    thirds = np.array_split(np.arange(len(counts)), 3)
    ends = [float(shares[third].mean()) if len(third) else float(shares.mean()) for third in thirds]
    values = [
        float(shares.mean()),
        float(shares.min()),
        float(np.min(counts)),
        float(np.log(counts).sum()),
        float(np.log(graph.cost["params"](full))),
        ends[-1] - ends[0],
        *(_spent(graph, full, [steps[step] for step in third]) for third in thirds),
    ]
    return dict(zip(WIDTHS, values, strict=True))


def _spent(graph: LayerGraph, full: Int[np.ndarray, " group"], some: list[int]) -> float:
    """What some groups add to the network's macs, as a share of the dense network's."""
    without = full.copy()
    without[some] = 0
    cost = graph.cost["macs"]
    return float(cost(full) - cost(without)) / float(cost(graph.full))
