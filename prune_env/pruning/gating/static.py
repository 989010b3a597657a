"""Static importance that is trained with the network: one score per channel, the same for all inputs.

Both published forms of Chen, Chen, Pan (NeurIPS 2020): the free vector per layer of the text (section 3.1.2), and the
small predictor over filter features of the official code. Both start at one, where they change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN = 100
"""Hidden units of the predictor, as in the official code."""

FEATURES = ("learned", "distance", "norm", "taylor")
"""What the predictor reads of a channel, in the official code's order."""


class StaticVector(nn.Module):
    """A free score per channel.

    Deviation: scores start at one instead of at random, so that attaching them changes no output; what they rank by
    before they have learned anything comes from `GatedNetwork.share_scales`.
    """

    free = True

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([nn.Parameter(torch.ones(len(weight))) for weight in weights])

    def scores(self) -> list[Tensor]:
        """`[channel]` per layer, in forward order."""
        return list(self.vectors)

    def refresh(self, weights: Mapping[int, Tensor]) -> None:
        """Nothing: the scores follow from no weight."""

    @torch.no_grad()
    def absorb(self, factors: list[Tensor]) -> None:
        """Multiply the scores by `[channel]` factors per layer."""
        for vector, factor in zip(self.vectors, factors, strict=True):
            vector.mul_(factor)

    @torch.no_grad()
    def lower(self, removed: list[Tensor]) -> None:
        """Let scores of channels `[channel]` per layer be below all others; among themselves they rank as before."""
        for vector, low in zip(self.vectors, removed, strict=True):
            if low.any() and (over := vector[low].max() - vector[~low].min()) >= 0:
                vector[low] -= over + 1e-3

    def restrict(self, kept: list[Tensor]) -> None:
        """Forget the channels that were cut away; `kept` holds the indices that stay, per layer."""
        for at, index in enumerate(kept):
            self.vectors[at] = nn.Parameter(self.vectors[at].detach()[index].clone())


class StaticPredictor(nn.Module):
    """One small network for all layers, from features of a filter to its score.

    `Linear(4, 100) - SELU - Linear(100, 1)` as in the official code; its last bias starts at one, its last weights at
    zero (there: torch's default). How the code's distance and norm are computed is not published (they come from a
    checkpoint that is not shipped). Here: the norm is the filter's L2 norm, the distance the mean L2 distance to the
    layer's other filters, both divided by their mean over the layer. The Taylor feature is the code's: the sum over a
    filter of `(w * gradient)^2`, divided by the L2 norm over the layer's channels plus 1e-3. (The code divides the
    gradient by a count first; here it is that of a mean loss.)
    """

    free = False

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.learned = nn.ParameterList([nn.Parameter(torch.ones(len(weight))) for weight in weights])
        first, last = nn.Linear(len(FEATURES), HIDDEN), nn.Linear(HIDDEN, 1)
        self.predictor = nn.Sequential(first, nn.SELU(), last)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(1.0)
        for at, weight in enumerate(weights):
            self.register_buffer(f"features_{at}", torch.zeros(len(weight), len(FEATURES) - 1))
        self.refresh(dict(enumerate(weights)))

    def scores(self) -> list[Tensor]:
        """`[channel]` per layer, in forward order."""
        with torch.autocast(self.learned[0].device.type, enabled=False):
            return [
                self.predictor(torch.cat([learned[:, None], self.get_buffer(f"features_{at}")], dim=1)).squeeze(1)
                for at, learned in enumerate(self.learned)
            ]

    @torch.no_grad()
    def refresh(self, weights: Mapping[int, Tensor]) -> None:
        """Compute the features of some layers anew, in place; without a gradient the Taylor feature stays."""
        for at, weight in weights.items():
            features = self.get_buffer(f"features_{at}")
            features[:, 0] = _relative(filter_distance(weight))
            features[:, 1] = _relative(weight.flatten(1).norm(dim=1))
            if weight.grad is not None:
                features[:, 2] = taylor(weight, weight.grad)

    def restrict(self, kept: list[Tensor]) -> None:
        """Forget the channels that were cut away; `kept` holds the indices that stay, per layer."""
        for at, index in enumerate(kept):
            self.learned[at] = nn.Parameter(self.learned[at].detach()[index].clone())
            setattr(self, f"features_{at}", self.get_buffer(f"features_{at}")[index].clone())


STATIC_IMPORTANCES = {"vector": StaticVector, "filters": StaticPredictor}
"""Trained static importance by name."""


def filter_distance(weight: Float[Tensor, "channel ..."]) -> Float[Tensor, " channel"]:
    """Mean L2 distance of each filter to the other filters of its layer."""
    rows = weight.detach().flatten(1).float()
    return torch.cdist(rows, rows).sum(1) / max(len(rows) - 1, 1)


def taylor(weight: Float[Tensor, "channel ..."], gradient: Float[Tensor, "channel ..."]) -> Float[Tensor, " channel"]:
    """First-order Taylor importance of each filter, relative to its layer."""
    squares = (weight.detach() * gradient).flatten(1).float().square().sum(1)
    return squares / (squares.norm() + 1e-3)


def _relative(values: Float[Tensor, " channel"]) -> Float[Tensor, " channel"]:
    return values / values.mean().clamp_min(1e-12)
