"""Accounting: what each input really costs, and what is really stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int64, Real

from prune_env.pruning.gating.network import GatedNetwork, producer_of
from prune_env.pruning.graph import LayerGraph


@dataclass(frozen=True, eq=False)
class Accounting:
    """Closed forms of the macs and parameters of a gated network.

    Attributes:
        graph: Graph of the network underneath, before anything is cut.
        names: Gated groups in forward order.
        added: `[layers]` parameters per channel that a gated layer has beside its predictor's weights and static
            score, and the ungated one has not: none where scale and shift were a BatchNorm's.
    """

    graph: LayerGraph
    names: tuple[str, ...]
    added: np.ndarray

    @classmethod
    def of(cls, gated: GatedNetwork) -> Accounting:
        """The accounting of a gated network."""
        return cls(gated.graph, gated.names, np.array([layer.added for layer in gated.layers], dtype=np.int64))

    @cached_property
    def full(self) -> Int64[np.ndarray, " layer"]:
        """Channels of each gated layer."""
        return np.array([self.graph.group(name).channels for name in self.names], dtype=np.int64)

    @cached_property
    def _columns(self) -> list[int]:
        return [self.graph.position(name) for name in self.names]

    @cached_property
    def _inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs of each gated layer as `constant + slope @ counts` of the gated groups."""
        constant = np.array(
            [self.graph.layer(producer_of(self.graph, n).module).in_channels for n in self.names], float
        )
        slope = np.zeros((len(self.names), len(self.names)))
        for row, name in enumerate(self.names):
            module = producer_of(self.graph, name).module
            for column, other in enumerate(self.names):
                group = self.graph.group(other)
                width = sum(len(slot.index) for slot in group.consumers if slot.module == module)
                slope[row, column] = width / group.channels
        return constant - slope @ self.full, slope

    def _cost(self, resource: str, counts: np.ndarray) -> np.ndarray:
        # In the format of the counts: shares of channels need not be whole.
        rows = np.broadcast_to(self.graph.full, (*counts.shape[:-1], len(self.graph.full))).astype(counts.dtype)
        rows[..., self._columns] = counts
        return np.asarray(self.graph.cost[resource](rows), dtype=np.float64)

    def predictor_macs(self, kept: Int64[np.ndarray, "*batch layer"]) -> Float[np.ndarray, "*batch"]:
        """Multiply-accumulates of all runtime predictors for one input, with `kept` channels stored."""
        constant, slope = self._inputs
        return np.asarray(((constant + kept @ slope.T) * kept).sum(-1))

    def macs(
        self, active: Int64[np.ndarray, "*batch layer"], kept: Int64[np.ndarray, " layer"]
    ) -> Float[np.ndarray, "*batch"]:
        """Dynamic macs of inputs: every layer at its active outputs times its active inputs, and the predictors.

        Args:
            active: Active channels of each gated layer for each input.
            kept: Stored channels of each gated layer: what the predictors score.
        """
        return np.asarray(self.bare_macs(active) + self.predictor_macs(kept))

    def bare_macs(self, counts: Real[np.ndarray, "*batch layer"]) -> Float[np.ndarray, "*batch"]:
        """Macs of the layers alone at these counts, without predictors."""
        return self._cost("macs", counts)

    def even_macs(self, keep: float) -> float:
        """Whole macs of the layers alone with the same share of channels in every gated layer: a budget."""
        return float(np.floor(self.bare_macs(keep * self.full)))

    def params(self, kept: Int64[np.ndarray, "*batch layer"]) -> Float[np.ndarray, "*batch"]:
        """Stored parameters: the network's, the predictors' and one static score per channel."""
        # A predictor has as many weights as multiply-accumulates.
        return np.asarray(self.bare_params(kept) + self.predictor_macs(kept) + kept @ (1 + self.added))

    def bare_params(self, counts: Real[np.ndarray, "*batch layer"]) -> Float[np.ndarray, "*batch"]:
        """Parameters of the network alone at these counts."""
        return self._cost("params", counts)

    @cached_property
    def dense_macs(self) -> float:
        """Macs of the dense network without gates."""
        return float(self.bare_macs(self.full))

    @cached_property
    def dense_params(self) -> float:
        """Parameters of the dense network without gates."""
        return float(self.bare_params(self.full))
