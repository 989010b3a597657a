"""Closed forms of what removing channels costs a consumer whose other inputs compensate.

All work on a consumer's weight matrix W `[row, column]`, the second moment A of its inputs `[column, column]` (ridge
included) and `owner`, the channel that each column belongs to, -1 for inputs that always stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ROUNDS = 256
"""Rounds of a backward elimination; a group with more channels loses several in each."""


def nested_errors(
    weights: Float[Tensor, "row column"], second: Float[Tensor, "column column"], owner: np.ndarray, order: np.ndarray
) -> Float[np.ndarray, " count"]:
    """Relative error when the first 0, 1, ..., all channels of `order` are kept, and every other input too.

    With the columns in that order and A = L L^T, the error of keeping the first k columns is
    tr(W_R S W_R^T) = ||(W L)_R||^2, since the Schur complement is S = L_RR L_RR^T: one factor holds every error.
    """
    place = np.where(owner < 0, -1, np.argsort(order)[owner])
    columns = torch.from_numpy(np.argsort(place, kind="stable"))
    factor = torch.linalg.cholesky(second[columns][:, columns])
    added = (weights[:, columns] @ factor).square().sum(0).numpy()
    per_channel = np.bincount(np.sort(place) + 1, weights=added, minlength=len(order) + 1)
    errors = np.append(np.cumsum(per_channel[:0:-1])[::-1], 0.0)
    return errors / max(per_channel.sum(), np.finfo(np.float64).tiny)


def eliminate(readers: Sequence[Reader], channels: int) -> Float[Tensor, " channel"]:
    """Greedy backward elimination: again and again the channel goes whose loss costs least, the rest compensating.

    Args:
        readers: One state per consumer; they are used up.
        channels: Channels of the group.

    Returns:
        For each channel the relative error, averaged over the consumers, at the moment when it has gone after all
        weaker ones: rising in the order of removal and comparable between groups.
    """
    score = torch.zeros(channels, dtype=torch.float64)
    alive = np.ones(channels, dtype=bool)
    step, error = -(-channels // ROUNDS), 0.0
    while alive.any():
        cost = torch.stack([reader.costs(alive) for reader in readers]).mean(0)
        candidates = np.flatnonzero(alive)
        # Stable, and from the end: among equals the lower index stays, as in a plan.
        weakest = candidates[::-1][np.argsort(cost.numpy()[candidates[::-1]], kind="stable")][:step].copy()
        score[weakest] = error + cost[weakest]
        error += float(np.mean([reader.remove(weakest) for reader in readers]))
        alive[weakest] = False
    return score


@dataclass(eq=False)
class Reader:
    """One consumer during an elimination: its refitted weights and the inverse moment of the inputs that are left.

    Attributes:
        weights: `[row, column]`, refitted after each removal.
        inverse: P = A^-1 of the inputs that are left, zero where they are gone.
        owner: The channel of each column, or -1.
        energy: Second moment of the dense outputs, tr(W A W^T).
    """

    weights: Tensor
    inverse: Tensor
    owner: np.ndarray
    energy: float

    @classmethod
    def of(
        cls, weights: Float[Tensor, "row column"], second: Float[Tensor, "column column"], owner: np.ndarray
    ) -> Reader:
        """The consumer with all its inputs."""
        energy = float(((weights @ second) * weights).sum().clamp_min(torch.finfo(second.dtype).tiny))
        return cls(weights.clone(), torch.cholesky_inverse(torch.linalg.cholesky(second)), owner, energy)

    def costs(self, alive: np.ndarray) -> Float[Tensor, " channel"]:
        """Relative error that each channel's removal would add: tr(W_c (P_cc)^-1 W_c^T), 0 for those not alive."""
        cost = torch.zeros(len(alive), dtype=self.weights.dtype)
        for channels, columns in self._blocks(alive):
            block = self.inverse[columns[:, :, None], columns[:, None, :]]
            read = self.weights[:, columns].permute(1, 2, 0)
            gram = read @ read.transpose(1, 2)
            cost[channels] = torch.linalg.solve(block, gram).diagonal(dim1=1, dim2=2).sum(1)
        return cost / self.energy

    def remove(self, channels: np.ndarray) -> float:
        """Take channels away, let the others compensate, and return the relative error that this adds."""
        gone = torch.from_numpy(np.flatnonzero(np.isin(self.owner, channels)))
        if not len(gone):
            return 0.0
        lost, across = self.weights[:, gone], self.inverse[gone]
        solved = torch.linalg.solve(across[:, gone], torch.cat([across, lost.T], dim=1))
        share, removed = solved[:, : across.shape[1]], solved[:, across.shape[1] :]
        self.weights.addmm_(lost, share, alpha=-1)
        self.inverse.addmm_(across.T, share, alpha=-1)
        for tensor in (self.weights.T, self.inverse, self.inverse.T):
            tensor.index_fill_(0, gone, 0)
        return float((removed.T * lost).sum()) / self.energy

    def _blocks(self, alive: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Channels with equally many columns, `[n]`, and those columns, `[n, size]`."""
        mine = np.flatnonzero(self.owner >= 0)
        mine = mine[alive[self.owner[mine]]]
        columns = mine[np.argsort(self.owner[mine], kind="stable")]
        sizes = np.bincount(self.owner[mine], minlength=len(alive))
        starts = np.cumsum(sizes) - sizes
        for size in np.unique(sizes[sizes > 0]):
            same = np.flatnonzero(sizes == size)
            yield torch.from_numpy(same), torch.from_numpy(columns[starts[same][:, None] + np.arange(size)])
