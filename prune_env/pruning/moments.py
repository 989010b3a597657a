"""Second moments of what each consumer reads: one pass over images, then closed forms in place of evaluations.

With A the second moment of a consumer's inputs (columns of its weight matrix W, see `consumer.py`), plus a ridge, and
K, R the kept and removed columns:

- refit: the kept weights that reproduce the dense output best, W'_K = W_K + W_R A_RK (A_KK)^-1;
- what that costs: the squared error that remains, tr(W_R S W_R^T), S = A_RR - A_RK (A_KK)^-1 A_KR;
- with P = A^-1, the cost of one channel c alone: tr(W_c (P_cc)^-1 W_c^T), the saliency of optimal brain surgeon
  (Hassibi and Stork, NeurIPS 1992) in block form.

The ridge is noise added to the inputs on both sides, so it pulls towards the dense weights, not towards zero: with
every channel kept the refit is the identity and the error is zero.

A consumer with a bias, or with a BatchNorm directly behind it, is refitted on centred moments: the bias, or the
running mean, takes up the change of the mean output exactly. Any other consumer is refitted on uncentred moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_env.pruning.activations import watching
from prune_env.pruning.consumer import MAX_WIDTH, Consumer, complement, consumers, oriented
from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.plan import Plan
from prune_env.pruning.second_order import Reader, eliminate, nested_errors
from prune_env.pruning.surgery import dropped_axes

REFITS = ("none", "moments", "sequential")
"""Ways to refit the consumers after a cut: not, from moments (`Moments.refit`), or layer by layer."""
RIDGE = 1e-3
"""Ridge, as a share of the mean of the moment matrix's diagonal."""
POSITIONS = 32
"""Positions of a map taken from each image."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of what the consumers of a dense network's groups read.

    Attributes:
        consumers: Layout of every consumer that can be refitted.
        second: Consumer -> `[width, width]` float32: second moment plus ridge; centred where the consumer `shifts`.
        mean: Consumer -> `[width]` float32.
    """

    consumers: Mapping[str, Consumer]
    second: Mapping[str, Tensor] = field(repr=False)
    mean: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def collect(
        cls,
        network: nn.Module,
        graph: LayerGraph,
        images: Float[Tensor, "sample ..."],
        *,
        max_width: int = MAX_WIDTH,
        positions: int = POSITIONS,
        batch_size: int = 100,
    ) -> Moments:
        """Run images through the dense network once and sum up what its consumers read.

        Memory: 8 bytes (12 while collecting) times the summed squares of the widths, plus one batch's windows.

        Args:
            network: The dense network; mode, gradients and random state stay as they are.
            graph: Its graph.
            images: Normalised training images.
            max_width: Largest window that is solved anew; beyond it channels are mixed.
            positions: Positions of a map taken from each image, drawn anew (seeded) for each batch.
            batch_size: Images that run at once.
        """
        return collect(network, graph.groups, images, max_width=max_width, positions=positions, batch_size=batch_size)

    def covers(self, group: Group) -> bool:
        """Whether some consumer of the group has moments; without any, `second_order` has nothing to say."""
        return any(slot.module in self.consumers for slot in group.consumers)

    def second_order(self, network: nn.Module, group: Group) -> Float[Tensor, " channel"]:
        """Error of the consumers' outputs when a channel has gone after all weaker ones, the others compensating.

        Greedy backward elimination with the block form of the saliency of optimal brain surgeon. The error is a
        share of the output's second moment, averaged over the consumers that have moments.

        Raises:
            ValueError: No consumer of the group has moments.
        """
        if not self.covers(group):
            raise ValueError(f"no consumer of group {group.name!r} has moments")
        readers = [
            Reader.of(self._weights(network, name), self.second[name].double(), owner)
            for name, owner in self._owners(group)
        ]
        return eliminate(readers, group.channels).float()

    def error_curve(
        self, network: nn.Module, group: Group, *, scores: Float[Tensor, " channel"], points: int | None = None
    ) -> Float[np.ndarray, " point"]:
        """Error of the consumers' outputs, refitted, against the share of the group's channels that is kept.

        Args:
            network: The dense network.
            group: One of its groups.
            scores: Higher = kept longer; ties go to the lower index, as in `Plan.of_counts`.
            points: Points of the curve, at keep 0 to 1 in equal steps; None gives one per channel count.

        Returns:
            Shares of the output's second moment in [0, 1], never rising, 0 at full, averaged over the consumers that
            have moments. Without any the curve is 1 - keep.
        """
        order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
        curves = [
            nested_errors(self._weights(network, name), self.second[name].double(), owner, order)
            for name, owner in self._owners(group)
        ]
        steps = np.linspace(0, 1, group.channels + 1)
        curve = np.mean(curves, axis=0) if curves else 1 - steps
        return curve if points is None else np.interp(np.linspace(0, 1, points), steps, curve)

    @torch.no_grad()
    def refit(self, network: nn.Module, small: nn.Module, graph: LayerGraph, plan: Plan) -> None:
        """Give the consumers of a cut network the weights that best reproduce the dense outputs, in place.

        Consumers that lost no input, or have no moments, are left as they are.

        Args:
            network: The dense network that the moments come from.
            small: The same network cut by `plan`.
            graph: The graph of both.
            plan: What is kept.
        """
        dropped = dropped_axes(graph, plan)
        for (name, role), (_, positions) in dropped.items():
            if role != "in" or name not in self.consumers:
                continue
            _, outputs = dropped.get((name, "out"), (0, np.empty(0, dtype=np.int64)))
            self._refit(network, small, name, (positions, outputs))

    def _refit(self, dense: nn.Module, small: nn.Module, name: str, dropped: tuple[np.ndarray, np.ndarray]) -> None:
        consumer, second, mean = self.consumers[name], self.second[name], self.mean[name]
        positions, outputs = dropped
        weight = oriented(dense.get_submodule(name)).cpu()
        if len(outputs):
            weight = weight.index_select(0, complement(outputs, len(weight)))
        removed = torch.from_numpy(consumer.columns(positions))
        kept = complement(removed.numpy(), consumer.width)
        columns = second.index_select(1, kept)
        factor = torch.linalg.cholesky(columns.index_select(0, kept))
        across = columns.index_select(0, removed)
        lost = consumer.matrix(weight).index_select(1, removed).to(second.dtype)
        # W_R (A_RK A_KK^-1) = (W_R A_RK) A_KK^-1: the side with fewer rows is solved.
        if len(lost) < len(removed):
            change = torch.cholesky_solve((lost @ across).T, factor).T
        else:
            change = lost @ torch.cholesky_solve(across.T, factor).T
        shape = oriented(small.get_submodule(name))
        shape += consumer.weight(change, shape).to(shape)
        if consumer.shifts(dense):
            moved = lost @ mean[removed] - change @ mean[kept]
            consumer.shift(small, moved.reshape(len(shape), -1).sum(1))

    def _weights(self, network: nn.Module, name: str) -> Float[Tensor, "row column"]:
        """A consumer's weight matrix in float64, or a square one that gives the same errors if it is tall."""
        matrix = self.consumers[name].matrix(oriented(network.get_submodule(name))).cpu()
        if len(matrix) <= matrix.shape[1]:
            return matrix.double()
        # Errors depend on W^T W alone; the flattened layer behind a VGG has 200,000 rows.
        values, vectors = torch.linalg.eigh(sum(rows.double().T @ rows.double() for rows in matrix.split(4096)))
        return values.clamp_min(0).sqrt()[:, None] * vectors.T

    def _owners(self, group: Group) -> list[tuple[str, np.ndarray]]:
        """Consumers of a group that have moments, each with the group's channel that owns a column, or -1."""
        owners: dict[str, np.ndarray] = {}
        for slot in group.consumers:
            if slot.module in self.consumers:
                consumer = self.consumers[slot.module]
                owner = owners.setdefault(slot.module, np.full(consumer.channels, -1))
                owner[slot.index // consumer.fold] = slot.unit
        return [(name, np.repeat(owner, self.consumers[name].width // len(owner))) for name, owner in owners.items()]


def collect(
    network: nn.Module,
    groups: Sequence[Group],
    images: Float[Tensor, "sample ..."],
    *,
    max_width: int = MAX_WIDTH,
    positions: int = POSITIONS,
    batch_size: int = 100,
) -> Moments:
    """`Moments.collect` for some groups of a network."""
    found = consumers(network, groups, images[:1], max_width=max_width)
    # One generator for each, so that a consumer's samples do not depend on which others are watched.
    generators = {name: torch.Generator().manual_seed(0) for name in found}
    sums: dict[str, MomentSum] = {}

    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        x = x.detach().float()
        columns = found[name].samples(module, x, limit=positions, generator=generators[name])
        sums.setdefault(name, MomentSum()).add(columns)

    with watching(network, found, observe), torch.no_grad():
        for batch in images.split(batch_size):
            network(batch)
    second, mean = {}, {}
    for name in sums:
        second[name] = ridged(sums[name].moment(centred=found[name].shifts(network))).float()
        mean[name] = sums[name].mean().float()
    return Moments({name: found[name] for name in second}, second, mean)


def ridged(second: Float[Tensor, "column column"]) -> Float[Tensor, "column column"]:
    """A second moment plus the ridge."""
    ridge = RIDGE * second.diagonal().mean().clamp_min(1e-12)
    return second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)


@dataclass(eq=False)
class MomentSum:
    """Running sums of samples and their products, about the mean of the first samples.

    The origin keeps inputs precise whose variance is small beside their mean: products are summed in float32.
    """

    count: int = 0
    origin: Tensor = field(init=False)
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def add(self, columns: Float[Tensor, "sample column"]) -> None:
        """Count samples in."""
        if self.count == 0:
            self.origin = columns.mean(0)
        columns = columns - self.origin
        first, second = columns.sum(0).double().cpu(), (columns.T @ columns).double().cpu()
        if self.count == 0:
            self.first, self.second = first, second
        else:
            self.first += first
            self.second += second
        self.count += len(columns)

    def mean(self) -> Float[Tensor, " column"]:
        """Mean, float64."""
        return self.origin.double().cpu() + self.first / self.count

    def moment(self, *, centred: bool) -> Float[Tensor, "column column"]:
        """Second moment about the mean or about zero, float64."""
        offset, mean = self.first / self.count, self.mean()
        second = self.second / self.count - torch.outer(offset, offset)
        return second if centred else second + torch.outer(mean, mean)
