"""How well a score ranks plans: Kendall's tau-b, regret, their bootstrap intervals, and cross-validated regressions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Values = Float[np.ndarray, " plan"]
Weights = Int[np.ndarray, "draw plan"]

DRAWS = 2000
"""Bootstrap samples."""
LEVEL = 0.95
"""Probability of an interval."""
PAIRS = 5
"""Plans with two seeds from which on their noise says what it leaves of a tau; that of fewer is a guess."""
RIDGE = 1.0
"""Ridge of a regression on standardised columns; what one more plan at the mean of all would weigh."""


@dataclass(frozen=True)
class Estimate:
    """A statistic of all plans, and the interval between percentiles of it over resampled plans."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """`value [low, high]`."""
        value, low, high = (f"{scale * number:.{digits}f}" for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def tau(one: Values, other: Values) -> float:
    """Kendall's tau-b (Kendall 1945): concordant minus discordant pairs, over the geometric mean of untied pairs.

    0 where one of the two has no two different values: it ranks nothing.
    """
    return float(tau_samples(one, other, np.ones((1, len(one)), dtype=np.int64))[0])


def tau_samples(one: Values, other: Values, weights: Weights) -> Float[np.ndarray, " draw"]:
    """Tau-b of each draw; a plan that was drawn twice is tied with itself."""
    signs = [np.sign(v[:, None] - v[None, :]) for v in (one, other)]
    concordant, *untied = (
        ((weights @ pairs) * weights).sum(1).astype(float)
        for pairs in (signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1]))
    )
    scale = np.sqrt(untied[0] * untied[1])
    return np.divide(concordant, scale, out=np.zeros_like(scale), where=scale > 0)


def regret(score: Values, truth: Values, *, top: int) -> float:
    """What the best of the `top` plans by a score loses against the best plan; 0 is best.

    Among plans with the same score the worse ones come first: a score gets no credit for what it does not say.
    """
    return float(_regrets(score, truth, np.ones((1, len(score)), dtype=np.int64), top=top)[0])


def _regrets(score: Values, truth: Values, weights: Weights, *, top: int) -> Float[np.ndarray, " draw"]:
    order = np.lexsort((truth, -score))
    here: Bool[np.ndarray, "draw plan"] = weights[:, order] > 0
    chosen = here & (here.cumsum(1) <= top)
    best, found = (np.where(which, truth[order], -np.inf).max(1) for which in (here, chosen))
    return best - found


def draws(plans: int, *, seed: int = 0, count: int = DRAWS) -> Weights:
    """How often each plan comes in each bootstrap sample of as many plans."""
    return np.random.default_rng(seed).multinomial(plans, np.full(plans, 1 / plans), size=count)


def tau_estimate(score: Values, truth: Values, weights: Weights) -> Estimate:
    """Tau-b with its interval."""
    return estimate(tau(score, truth), tau_samples(score, truth, weights))


def regret_estimate(score: Values, truth: Values, weights: Weights, *, top: int) -> Estimate:
    """Regret with its interval."""
    return estimate(regret(score, truth, top=top), _regrets(score, truth, weights, top=top))


def estimate(value: float, samples: Float[np.ndarray, " draw"]) -> Estimate:
    """A statistic with the interval between percentiles of its bootstrap samples."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def predicted(columns: Float[np.ndarray, "plan column"], truth: Values, *, folds: int = 10, seed: int = 0) -> Values:
    """What a ridge regression says of each plan that has learned from the plans of the other folds alone.

    Args:
        columns: Scores to predict from; standardised by what is learned from.
        truth: What is predicted.
        folds: Parts of the plans, at most as many as there are; as many is leave-one-out.
        seed: Deals the plans to the parts.
    """
    part = np.random.default_rng(seed).permutation(len(truth)) % min(folds, len(truth))
    result = np.empty(len(truth))
    for fold in np.unique(part):
        known, asked = part != fold, part == fold
        fit = ridge(columns[known], truth[known])
        result[asked] = fit(columns[asked])
    return result


def ridge(
    columns: Float[np.ndarray, "plan column"], truth: Values
) -> Callable[[Float[np.ndarray, "other column"]], Float[np.ndarray, " other"]]:
    """A linear function of standardised columns, fitted by least squares with a ridge, its constant free."""
    mean, spread, level = columns.mean(0), columns.std(0), truth.mean()
    spread = np.where(spread > 0, spread, 1.0)
    x = (columns - mean) / spread
    slopes = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (truth - level))
    return lambda other: level + (other - mean) / spread @ slopes


@dataclass(frozen=True)
class Spread:
    """How far plans lie apart, beside what another seed of the fine-tuning changes.

    Attributes:
        plans: Number of plans.
        low: Lowest truth, in [0, 1].
        high: Highest.
        deviation: Standard deviation between plans.
        pairs: Plans with two seeds.
        noise: Standard deviation of one fine-tuning around its plan's mean; None without pairs.
        ceiling: Tau that a score which knew every plan's mean over seeds is expected to have with one seed's truth;
            None with fewer than `PAIRS` pairs.
    """

    plans: int
    low: float
    high: float
    deviation: float
    pairs: int
    noise: float | None
    ceiling: float | None


def spread(first: dict[str, float], second: dict[str, float]) -> Spread:
    """The spread of the truth.

    Args:
        first: Plan -> truth from one seed, for two plans or more.
        second: The same from another seed, for some of the plans.
    """
    values = np.array(list(first.values()))
    both = sorted(first.keys() & second.keys())
    one, other = (np.array([seeds[name] for name in both]) for seeds in (first, second))
    noise = float(np.sqrt(np.mean((one - other) ** 2 / 2))) if both else None
    deviation, ends = float(values.std(ddof=1)), (float(values.min()), float(values.max()))
    ceiling = None if noise is None or len(both) < PAIRS else _ceiling(noise, deviation)
    return Spread(len(values), *ends, deviation, len(both), noise, ceiling)


def _ceiling(noise: float, deviation: float) -> float:
    """Kendall's tau of two normal variables is 2/pi asin(r) (Greiner 1909); r^2 is the share that is not noise."""
    lasting = 1 - (noise / deviation) ** 2 if deviation > 0 else 0.0
    return float(2 / np.pi * np.arcsin(np.sqrt(max(lasting, 0.0))))
