"""A surrogate: what the measured plans say about one that was not, how sure that is, and which is worth measuring.

A Gaussian process over the logarithms of the shares that groups keep (Rasmussen and Williams 2006, algorithm 2.1), with
the Matern 5/2 kernel that Snoek et al. 2012 (arXiv 1206.2944) chose for tuning. Cheap where evaluations are not: it
learns from some hundred plans in a fraction of a second. Of plans near the best ones it picks that with the largest
expected improvement (Jones, Schonlau and Welch 1998, EGO, eq. 15). Only near them: far from everything measured a
process knows nothing but that it knows nothing, and in ten dimensions or more nearly all there is lies far (Eriksson et
al. 2019, TuRBO, arXiv 1910.01739).

The constants were chosen on a made-up landscape, a smooth one like that of a ResNet-20; none mattered much there.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int

from baselines import allocate
from baselines.allocate import Choices, Counts

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

Shares = Float[np.ndarray, "trial group"]
Values = Float[np.ndarray, " trial"]

LENGTHS = (1.0, 2.0, 4.0, 8.0)
"""Length scales that are tried, in units of the logarithm of a share: the likeliest is taken."""
NOISES = (1e-3, 1e-2, 1e-1)
"""Variances that are tried of what a plan's value has beside the smooth part, as shares of the values' variance."""
CANDIDATES, LOOKED_AT = 512, 8
"""Plans that are guessed; how many of the most promising are brought to the budget exactly, until one is new."""
BISECTIONS = 16
"""Halvings of the scale at which a guess spends the budget."""
PARENTS = 2.0
"""Mean rank of the plan that a candidate is a neighbour of."""
REACH, UNLIKE = 0.25, 0.8
"""Standard deviation of the logarithm of a share's change, and of that deviation's own logarithm: some look far."""
CHANGED = 0.4
"""Share of the groups that a candidate changes."""


class Surrogate:
    """What is known after some plans were measured.

    Args:
        shares: `[trial, group]`, above 0.
        values: `[trial]`, higher = better.
    """

    def __init__(self, shares: Shares, values: Values) -> None:
        self.shares, self.values = shares, values

    @cached_property
    def process(self) -> GaussianProcessRegressor:
        """The likeliest of the processes that are tried."""
        # a second of imports that nothing but this needs
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern

        fixed: dict[str, Any] = {"optimizer": None}  # allowed, though its type is guessed from the default, a text
        tried = [
            GaussianProcessRegressor(Matern(length, nu=2.5), alpha=noise, normalize_y=True, **fixed)
            for length in LENGTHS
            for noise in NOISES
        ]
        fitted = [one.fit(np.log(self.shares), self.values) for one in tried]
        return max(fitted, key=lambda one: one.log_marginal_likelihood_value_)

    def predicted(self, shares: Shares) -> tuple[Values, Values]:
        """Mean and standard deviation of the values of plans."""
        # its types do not say that `return_std` makes it a pair
        return cast("tuple[Values, Values]", self.process.predict(np.log(shares), return_std=True))

    def improvement(self, shares: Shares) -> Values:
        """By how much each of some plans can be expected to beat the best measured one; 0 where it will not."""
        mean, deviation = self.predicted(shares)
        ahead, deviation = mean - self.values.max(), np.maximum(deviation, 1e-12)
        z = torch.from_numpy(ahead / deviation)
        density = torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
        return ahead * torch.special.ndtr(z).numpy() + deviation * density.numpy()


def promising(
    choices: Choices,
    shares: Shares,
    values: Values,
    measured: Container[tuple[int, ...]],
    rng: np.random.Generator,
) -> Counts:
    """The plan to measure next: of new ones near the best, that with the largest expected improvement.

    Args:
        choices: What may be chosen, and the budget; every candidate spends it.
        shares: `[trial, group]` of what was measured, at least one.
        values: `[trial]`, higher = better.
        measured: Counts of plans that are no news.
        rng: Draws the candidates.

    Returns:
        Counts; where no candidate is new, those of one that is not.
    """
    drawn = _neighbours(shares[np.argsort(-values, kind="stable")], rng)
    counts = _spending(choices, drawn)
    new = np.array([tuple(row) not in measured for row in counts.tolist()])
    if new.any():
        drawn, counts = drawn[new], counts[new]
        drawn = drawn[np.argsort(-Surrogate(shares, values).improvement(counts / choices.full), kind="stable")]
    exact = [allocate.scaled(choices, some) for some in drawn[:LOOKED_AT]]
    return next((found for found in exact if tuple(found.tolist()) not in measured), exact[0])


def _neighbours(ranked: Shares, rng: np.random.Generator) -> Float[np.ndarray, "plan group"]:
    """Some of the best plans, the better the more often, with a few shares of each multiplied by log-normal factors."""
    parents = ranked[np.minimum(rng.exponential(PARENTS, CANDIDATES).astype(np.int64), len(ranked) - 1)]
    few = rng.random(parents.shape) < CHANGED
    few[np.arange(CANDIDATES), rng.integers(parents.shape[1], size=CANDIDATES)] = True
    reach = REACH * np.exp(UNLIKE * rng.normal(size=(CANDIDATES, 1)))
    return np.minimum(parents * np.exp(few * reach * rng.normal(size=parents.shape)), 1.0)


def _spending(choices: Choices, shares: Float[np.ndarray, "plan group"]) -> Int[np.ndarray, "plan group"]:
    """Counts in proportion to shares, as large as the budget allows: about what `allocate.scaled` makes of each."""

    def counts(scales: np.ndarray) -> np.ndarray:
        wanted = np.rint(scales[:, None] * shares * choices.full)
        return np.clip(wanted, choices.minimum, choices.full).astype(np.int64)

    low, high = np.zeros(len(shares)), 1.0 / shares.min(1)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = choices.cost(counts(middle)) <= choices.limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return counts(np.where(choices.cost(counts(high)) <= choices.limit, high, low))
