"""Interquartile means with stratified bootstrap intervals, for few runs of things that vary much.

Agarwal, Schwarzer, Castro, Courville, Bellemare, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021 (arXiv 2108.13264), section 4. Scores are `[run, stratum, ...]`; a stratum is a task, and its
runs are drawn anew among themselves. Values may be infinite (never reached).
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
TAIL = 0.025
"""Share of the resamples that lies beyond each end of an interval."""


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all runs of all strata, `[...]`; at each end a quarter goes, rounded down.

    Args:
        scores: `[run, stratum, ...]`.
    """
    ordered = np.sort(scores.reshape(-1, *scores.shape[2:]), axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def bootstrap(scores: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Ends of the 95 % percentile interval of the interquartile mean, `[2, ...]`.

    Args:
        scores: `[run, stratum, ...]`.
        resamples: How often runs are drawn, with replacement, within their strata.
        seed: Seed of the draws.
    """
    rng, (runs, strata) = np.random.default_rng(seed), scores.shape[:2]
    drawn = [rng.integers(runs, size=(runs, strata)) for _ in range(resamples)]
    means = np.sort([interquartile_mean(scores[again, range(strata)]) for again in drawn], axis=0)
    beyond = int(TAIL * resamples)
    return means[[beyond, -1 - beyond]]
