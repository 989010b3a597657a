"""Scales of BatchNorms: which carry prunable channels, where a group's own scales part, and one threshold for all.

What training did to the scales is none of this file's business. A channel is worth the largest |gamma| of the norms
that carry it. A residual stream has many: the channel may go when none of its writers needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from baselines import allocate
from baselines.allocate import Counts
from baselines.method import Case, Scores
from baselines.potential import Curve, ranked
from prune_env.envs.dynamics import Problem
from prune_env.pruning.consumer import weights_of
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.surgery import BATCH_NORMS

UPPER = 1.0
"""a, the upper pole of the scales; the lower one is 0."""
BINS = 100
"""Bins of the histogram between the poles, each .01 wide."""

LIMIT = 0.2
"""A lower pole ends below it; the authors' code warns of a threshold above it."""

Threshold = Callable[[Float[np.ndarray, " channel"]], float]
"""|gamma| of a group's channels -> the value above which channels stay."""


@dataclass(frozen=True, eq=False)
class Site:
    """The scales of one BatchNorm that belong to one group.

    Attributes:
        group: The group's name.
        module: The BatchNorm's name.
        index: Positions in its weight.
        unit: The channel of the group that each position belongs to.
    """

    group: str
    module: str
    index: Int64[Tensor, " scale"]
    unit: Int64[np.ndarray, " scale"]


def sites(network: nn.Module, graph: LayerGraph) -> tuple[Site, ...]:
    """All scales of prunable channels, in forward order of the groups.

    Args:
        network: It is only read.
        graph: Its graph.

    Raises:
        ValueError: There are none; says what carries the channels instead.
    """
    found = tuple(
        Site(group.name, slot.module, torch.from_numpy(slot.index), slot.unit)
        for group in graph.groups
        for slot in group.carriers
        if slot.role == "both" and _has_scale(network.get_submodule(slot.module))
    )
    if found:
        return found
    carriers = {group.name: ", ".join(slot.module for slot in group.carriers) for group in graph.groups}
    seen = "; ".join(f"{name}: {what or 'no norm'}" for name, what in carriers.items())
    raise ValueError(f"no prunable group passes through a BatchNorm with a scale ({seen or 'nothing is prunable'})")


def _has_scale(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and module.weight is not None


def gathered(network: nn.Module, found: Sequence[Site]) -> Float[Tensor, " scale"]:
    """The scales of all sites, one after the other: the paper's one vector gamma; a copy."""
    return torch.cat([weights_of(network.get_submodule(site.module))[site.index] for site in found])


def by_group(network: nn.Module, graph: LayerGraph) -> dict[str, np.ndarray]:
    """|gamma| of each channel of every group that has scales; the largest, where a channel has several.

    Raises:
        ValueError: No group has any.
    """
    worth: dict[str, np.ndarray] = {}
    for site in sites(network, graph):
        values = gathered(network, (site,)).abs().double().cpu().numpy()
        own = worth.setdefault(site.group, np.zeros(graph.group(site.group).channels))
        np.maximum.at(own, site.unit, values)
    return worth


def largest_scale(case: Case) -> Scores:
    """An importance stage: |gamma|; above them all, in the order of the given scores, channels without a BatchNorm.

    So a group without a BatchNorm, of which the method knows nothing, is the last to lose channels.

    Raises:
        ValueError: No group has a BatchNorm.
    """
    worth = by_group(case.problem.evaluator.network, case.problem.graph)
    top = max(float(values.max()) for values in worth.values()) or UPPER
    for group in case.problem.graph.groups:
        if group.name not in worth:
            order = np.argsort(-np.asarray(case.scores[group.name]), kind="stable")
            above = np.empty(group.channels)
            above[order] = 1 - np.arange(group.channels) / group.channels
            worth[group.name] = top * (1 + above)
    return worth


def first_valley(scales: Float[np.ndarray, " channel"]) -> float:
    """The authors' threshold (section 3.3; `search_threshold` of their code): the histogram's first local minimum.

    With y the counts of the bins and dy their differences, the left edge of bin i + 1 for the first i with dy_i <= 0
    <= dy_{i + 1}. Two empty bins at 0 are one: nothing goes. The authors' code fails where there is no such i; here
    the widest gap decides.

    Args:
        scales: |gamma| of one group; those above the upper pole count as kept, in no bin.
    """
    edge, _ = _valley(scales)
    return widest_gap(scales) if edge is None else edge


def clear_valley(scales: Float[np.ndarray, " channel"]) -> float:
    """The same if the scales really part there: none lies in the valley's bin, and some above it; else the widest gap.

    The guard is ours: noise makes a local minimum in the histogram of any small layer, pole or no pole, and where a
    layer of small scales ends there is no valley, but the end of its only peak. If that peak is the first bin, though,
    it is the pole at 0, and everything goes.

    Args:
        scales: |gamma| of one group.
    """
    edge, within = _valley(scales)
    dead = scales.max() < UPPER / BINS
    if edge is not None and not within and (dead or scales.max() >= edge):
        return edge
    return widest_gap(scales)


def _valley(scales: Float[np.ndarray, " channel"]) -> tuple[float | None, int]:
    """Left edge of the first local minimum's bin, and how many scales lie in that bin; (None, 0) without one."""
    counts, edges = np.histogram(scales, bins=BINS, range=(0.0, UPPER))
    slope = np.diff(counts)
    found = np.flatnonzero((slope[:-1] <= 0) & (slope[1:] >= 0))
    return (float(edges[found[0] + 1]), int(counts[found[0] + 1])) if len(found) else (None, 0)


def widest_gap(scales: Float[np.ndarray, " channel"]) -> float:
    """The scale below the widest gap between neighbours; -inf, so that all stay, if no pole at 0 ends there.

    That is so where the gap is less than two bins wide, or begins above `LIMIT`.

    Args:
        scales: |gamma| of one group.
    """
    ordered = np.sort(scales)
    gaps = np.diff(ordered)
    if not len(gaps) or gaps.max() < 2 * UPPER / BINS:
        return -np.inf
    below = float(ordered[np.argmax(gaps)])
    return below if below <= LIMIT else -np.inf


def own_counts(worth: Scores, graph: LayerGraph, *, threshold: Threshold = clear_valley) -> Int64[np.ndarray, " group"]:
    """Channels above the threshold of each group of the graph; all, where there is no scale. May be 0.

    Args:
        worth: From `by_group`.
        graph: The graph.
        threshold: Where a group's scales part.
    """
    kept = graph.full.copy()
    for name, scales in worth.items():
        kept[graph.position(name)] = int(np.sum(scales > threshold(scales)))
    return kept


def own_ratios(case: Case, *, threshold: Threshold = clear_valley) -> Counts:
    """An allocate stage: every group keeps what lies above its own threshold, if the budget allows it.

    A smaller budget raises one threshold for all groups, below which nothing stays, until the budget just holds. A
    larger one changes nothing. Counts between two levels go up to the next one.

    Args:
        case: Its scores are those of `largest_scale`.
        threshold: Where a group's scales part.
    """
    problem = case.problem
    own = own_counts(by_group(problem.evaluator.network, problem.graph), problem.graph, threshold=threshold)
    wanted = own[list(problem.steps)]
    levels = tuple(
        levels[: np.searchsorted(levels, count) + 1] for levels, count in zip(case.choices.levels, wanted, strict=True)
    )
    names = [problem.graph.groups[step].name for step in problem.steps]
    return allocate.ranking(replace(case.choices, levels=levels), [np.asarray(case.scores[name]) for name in names])


def margin(scales: Float[np.ndarray, " channel"]) -> Curve:
    """How far a cut parts the scales: min gamma_kept - max gamma_pruned by count, relative to the largest.

    From 1, where the poles part, to -1, where the largest scale goes before the smallest; 0 where nothing is cut.

    Args:
        scales: |gamma| of one group, those first that stay longest.
    """
    least = np.minimum.accumulate(scales)[:-1]
    most = np.maximum.accumulate(scales[::-1])[::-1][1:]
    return np.concatenate([[-1.0], (least - most) / (scales.max() or 1.0), [0.0]])


def separability(problem: Problem) -> dict[str, Curve]:
    """For shaping: how far the cut of each group parts its scales, as polarization would have it (sect. 3.3).

    An extension, not in the paper. Without polarised training the scales are those of the dense network, which part
    little; the network of a task that was prepared by polarization has its poles. Which channels a cut keeps is for the
    environment's importance to say: scales that it contradicts count as badly parted.

    Raises:
        ValueError: No group has a BatchNorm.
    """
    graph = problem.graph
    worth = by_group(problem.evaluator.network, graph)
    return {name: margin(scales[ranked(problem, graph.group(name))]) for name, scales in worth.items()}
