"""Redundancy: extensions of this project to Neuron Merging (Kim et al., NeurIPS 2020), not part of the paper.

The paper repairs a cut that somebody else chose. The same similarities can choose it. A channel's strength is
||W_next[:, n]||_F |gamma_n|, with ||w_n|| in place of |gamma_n| where there is no norm. From it, without data:

- `merge_cost`, an importance. A channel that is merged into its nearest kept partner costs
  strength * min(1, sqrt(2 (1 - cos))): the distance between two vectors of one length, and from 60 degrees on what
  dropping it costs. The cheapest goes first, and what it was a partner to is charged to its own removal.
- `clusters`, an allocation: as many channels as a group has leaders, channels whose cosine with every leader before
  them is below tau; one tau for all groups, the highest that the budget allows. How much of a layer is kept follows
  from how redundant it is; which channels, from the importance that the user named: leaders lie apart, but many are
  weak.
- `Redundancy.residual` and `unmerged`, for shaping: the share of a group's squared strength that merging cannot carry,
  e = sum_{n pruned} strength^2 (1 - cos^2) / sum_n strength^2, and Phi = -sum over the groups of e.

Where a group cannot be merged (`merging_sites.unfit`), a pruned channel costs its whole strength.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from baselines import allocate
from baselines.allocate import Counts
from baselines.merging_sites import filters, norms, positions, unfit
from baselines.method import Case, Method, Scores
from baselines.neuron_merging import cosines, repair_by
from baselines.potential import Curve, ranked
from prune_env.envs.dynamics import Problem
from prune_env.pruning.consumer import oriented
from prune_env.pruning.graph import Group
from prune_env.pruning.surgery import BATCH_NORMS

Vector = Float64[np.ndarray, " channel"]


@dataclass(frozen=True, eq=False)
class Redundancy:
    """How far the channels of one group could stand in for each other.

    Attributes:
        strength: What each channel sends on, ||W_next[:, n]||_F |gamma_n|.
        cosine: Of the weights that write two channels.
        mergeable: Whether one channel can take over from another (`merging_sites.unfit` has nothing against it).
    """

    strength: Vector
    cosine: Float64[np.ndarray, "channel channel"]
    mergeable: bool

    @classmethod
    def of(cls, network: nn.Module, group: Group) -> Redundancy:
        """Read off the weights of a dense network."""
        cosine = cosines(filters(network, group)).numpy()
        return cls(_strength(network, group), cosine, unfit(network, group) is None)

    def residual(self, kept: Sequence[int]) -> float:
        """Share of the squared strength that is lost when the best kept partner takes over, in [0, 1].

        Args:
            kept: Kept channels, at least one.
        """
        energy = self.strength**2
        pruned = np.ones(len(energy), dtype=bool)
        pruned[list(kept)] = False
        nearest = self.cosine[:, list(kept)].max(axis=1).clip(0) if self.mergeable else np.zeros(len(energy))
        total = energy.sum()
        return float((energy * (1 - nearest**2))[pruned].sum() / total) if total > 0 else 0.0

    def residuals(self, order: Int[np.ndarray, " channel"]) -> Curve:
        """The residual when the first 0, 1, ..., all channels of an order are kept.

        Args:
            order: All channels, those first that stay longest.
        """
        energy = self.strength[order] ** 2
        nearest = np.zeros((len(order), len(order)))
        if self.mergeable:
            nearest = np.maximum.accumulate(self.cosine[order][:, order], axis=1).clip(0)
        # Row: channel; column: how many are kept, less one. What is below the diagonal is pruned.
        lost = np.tril(energy[:, None] * (1 - nearest**2), -1).sum(axis=0)
        total = energy.sum()
        return np.concatenate([[total], lost]) / (total if total > 0 else 1.0)

    def costs(self) -> Vector:
        """What is lost in all when a channel has gone after all that can go before it at less cost."""
        if not self.mergeable:
            order = np.argsort(self.strength, kind="stable")
            costs = np.empty_like(self.strength)
            costs[order] = np.cumsum(self.strength[order])
            return costs
        between = self.strength[:, None] * np.sqrt(2 * (1 - self.cosine)).clip(max=1)
        np.fill_diagonal(between, np.inf)
        # The last partner never goes: to be dropped costs the whole strength.
        return _eliminate(np.column_stack([between, self.strength]))

    def leaders(self) -> Vector:
        """1 - cosine with the nearest leader, by which channels are taken up one by one, the most distant first.

        The strongest channel leads, with a score above all others. At every tau, the channels that score above
        1 - tau are leaders, no two of them with a cosine of tau or more, and every other channel is that near to one.
        """
        nearest = np.full(len(self.strength), -np.inf)
        scores, following, channel = np.zeros_like(nearest), np.ones(len(nearest), dtype=bool), np.argmax(self.strength)
        for _ in range(len(nearest)):
            scores[channel] = 1 - max(nearest[channel], -2.0)
            following[channel] = False
            nearest = np.maximum(nearest, self.cosine[channel])
            channel = np.argmin(np.where(following, nearest, np.inf))
        return scores


def redundancies(network: nn.Module, groups: Iterable[Group]) -> dict[str, Redundancy]:
    """Group name -> redundancy; computed once, it serves every plan."""
    return {group.name: Redundancy.of(network, group) for group in groups}


def unmerged(problem: Problem) -> dict[str, Curve]:
    """For shaping: minus the residual of each group by count; from the dense weights alone, as in the paper."""
    groups = problem.graph.groups
    found = redundancies(problem.evaluator.network, groups)
    return {group.name: -found[group.name].residuals(ranked(problem, group)) for group in groups}


def merge_cost(case: Case) -> Scores:
    """The merge cost as an importance (`Redundancy.costs`)."""
    found = redundancies(case.problem.evaluator.network, case.problem.graph.groups)
    return {name: redundancy.costs() for name, redundancy in found.items()}


def clusters(case: Case) -> Counts:
    """As many channels per group as it has clusters at one tau for all groups, the highest that the budget allows."""
    groups = [case.problem.graph.groups[step] for step in case.problem.steps]
    found = redundancies(case.problem.evaluator.network, groups)
    return allocate.ranking(case.choices, [redundancy.leaders() for redundancy in found.values()])


def _strength(network: nn.Module, group: Group) -> Vector:
    sent = torch.zeros(group.channels, dtype=torch.float64)
    for slot in group.consumers:
        weight = oriented(network.get_submodule(slot.module))
        others = [axis for axis in range(weight.dim()) if axis != 1]
        by_position = torch.linalg.vector_norm(weight, dim=others).double().cpu().square()
        sent += by_position[positions(slot, group.channels)].sum(1)
    carried = [_gains(network.get_submodule(s.module))[positions(s, group.channels)] for s in norms(network, group)]
    own = sum(gain.square().sum(1) for gain in carried) if carried else filters(network, group).square().sum(1)
    return (sent * own).sqrt().numpy()


def _gains(norm: nn.Module) -> Tensor:
    assert isinstance(norm, BATCH_NORMS)
    gain = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach()
    return gain.double().cpu()


def _eliminate(costs: Float64[np.ndarray, "channel partner"]) -> Vector:
    """Greedy backward elimination: what all removals up to a channel's own have cost, in the order they are cheapest.

    Args:
        costs: What a removed channel costs with each partner; after the channels' own columns one that always stays.
    """
    channels = len(costs)
    total, stays = np.zeros(channels), np.ones(channels + 1, dtype=bool)
    partner, best, second = _two_best(costs, stays)
    spent = 0.0
    for _ in range(channels):
        gone = ~stays[:-1]
        # A channel also answers for those that it was the partner of: they go to their second best.
        charge = np.bincount(partner[0][gone], weights=(second - best)[gone], minlength=channels + 1)[:-1]
        price = np.where(gone, np.inf, best + charge)
        cheapest = int(np.argmin(price))
        spent += float(price[cheapest])
        total[cheapest] = spent
        stays[cheapest] = False
        if stays.sum() > 1:
            moved = np.flatnonzero((partner == cheapest).any(axis=0))
            partner[:, moved], best[moved], second[moved] = _two_best(costs[moved], stays)
    return total


def _two_best(
    costs: Float64[np.ndarray, "row partner"], stays: np.ndarray
) -> tuple[Int[np.ndarray, "2 row"], Float64[np.ndarray, " row"], Float64[np.ndarray, " row"]]:
    """The two cheapest partners that stay, and what each costs."""
    columns = np.flatnonzero(stays)
    open_costs = costs[:, columns]
    nearest = np.argpartition(open_costs, 1, axis=1)[:, :2]
    partner = columns[nearest].T
    best, second = np.take_along_axis(open_costs, nearest, axis=1).T
    return partner.copy(), best.copy(), second.copy()


MERGE_COST = Method(
    "merge_cost",
    "extension of Neuron Merging: the channels that are cheapest to merge go first",
    importance=merge_cost,
    repair=repair_by(),
)
MERGING_CLUSTERS = Method(
    "merging_clusters",
    "extension of Neuron Merging: one similarity for all groups decides how many channels lead",
    allocate=clusters,
    repair=repair_by(),
)
