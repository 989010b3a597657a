"""Runtime importance: what a channel is worth for one input, where the static importance knows only the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from prune_env.pruning.activations import pooled
from prune_env.pruning.graph import LayerGraph


class RuntimePredictor(Protocol):
    """Predicts the importance of every channel for every input."""

    def collect(
        self, network: nn.Module, graph: LayerGraph, images: Float[Tensor, "sample ..."]
    ) -> dict[str, Float[Tensor, "sample channel"]]:
        """Group name -> importance of its channels for each image, in [0, 1]. The network stays as it is."""
        ...


@dataclass(frozen=True)
class PooledActivation:
    """Mean absolute activation of a channel where its consumers read it, the signal of FBS (Gao et al., ICLR 2019).

    It needs no training: one pass of the dense network gives its mean and its spread over images.
    """

    def collect(
        self, network: nn.Module, graph: LayerGraph, images: Float[Tensor, "sample ..."]
    ) -> dict[str, Float[Tensor, "sample channel"]]:
        """Pooled activations, as shares of the largest one in the group.

        Args:
            network: The dense network; mode, gradients and random state stay as they are.
            graph: Its graph.
            images: Normalised images.
        """
        levels = pooled(network, graph.groups, images)
        return {name: level / level.max().clamp_min(1e-12) for name, level in levels.items()}
