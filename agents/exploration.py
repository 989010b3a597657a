"""Where an episode's actions come from: known plans, random ones, the best disturbed, or the learner with noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIGMA_START, SIGMA_END = 0.4, 0.05
"""Width of the noise at the start and the end of a run, in relative actions (the range is [-1, 1])."""
SIGMA_RANDOM = 0.6
"""Width of a random plan around the uniform one."""
SPREAD = 0.7
"""Standard deviation of the logarithm of an episode's own width around that: some episodes look far, some near."""
DISTURBED = 0.4
"""Share of an episode's steps that are disturbed: a change in few groups can be told from the rest."""
REDRAWS = 8
"""Attempts at a plan that was not measured yet."""


@dataclass(frozen=True)
class Draft:
    """How one episode will be played.

    Attributes:
        source: `uniform` or another known plan's name, `random`, `disturbed best`, or `policy`.
        script: `[steps]` actions fixed beforehand; None leaves them to the learner.
        noise: `[steps]` width of the noise on the learner's action; 0 for none.
        rng: Draws that noise.
    """

    source: str
    script: np.ndarray | None
    noise: np.ndarray
    rng: np.random.Generator

    def action(self, step: int, chosen: float) -> float:
        """The action of a step, given what the learner would choose."""
        if self.script is not None:
            return float(self.script[step])
        return truncated_normal(self.rng, chosen, self.noise[step]) if self.noise[step] > 0 else chosen


def draft(
    episode: int,
    *,
    episodes: int,
    guided: int,
    known: dict[str, np.ndarray],
    best: np.ndarray | None,
    own_noise: bool,
    played: Callable[[np.ndarray], bool],
    rng: np.random.Generator,
) -> Draft:
    """Plan the next episode.

    Args:
        episode: Its number, from 0.
        episodes: Of the whole run.
        guided: Episodes of the warm-up.
        known: Name -> actions of the plans to begin with.
        best: Actions of the best episode so far.
        own_noise: The learner explores by itself.
        played: Whether these actions lead to a plan that the run has measured already.
        rng: Source of all randomness.
    """
    names = list(known)
    if episode < len(names):
        return Draft(names[episode], known[names[episode]], np.zeros(len(known[names[episode]])), rng)
    if best is None:
        raise ValueError("the first episode must be a known plan")
    if episode < guided and episode % 2 == 0:
        script = [truncated_normal(rng, 0.0, SIGMA_RANDOM) for _ in best]
        return Draft("random", np.array(script), np.zeros(len(best)), rng)
    sigma = SIGMA_START * (SIGMA_END / SIGMA_START) ** (episode / max(episodes - 1, 1))
    sigma *= float(np.exp(SPREAD * rng.normal()))
    if episode < guided or episode % 2:
        return Draft("disturbed best", _fresh(best, sigma, played, rng), np.zeros(len(best)), rng)
    noise = np.zeros(len(best)) if own_noise else sigma * _few(len(best), rng)
    return Draft("policy", None, noise, rng)


def _fresh(
    best: np.ndarray, sigma: float, played: Callable[[np.ndarray], bool], rng: np.random.Generator
) -> np.ndarray:
    """The best actions disturbed so that a new plan comes out: small noise is often lost in rounding, so it grows."""
    script = best
    for _ in range(REDRAWS):
        noise = sigma * _few(len(best), rng)
        pairs = zip(best.tolist(), noise, strict=True)
        script = np.array([truncated_normal(rng, mean, width) for mean, width in pairs])
        if not played(script):
            break
        sigma *= 1.3
    return script


def _few(steps: int, rng: np.random.Generator) -> np.ndarray:
    """1 for the steps to disturb, at least one, and 0 for the others."""
    few = rng.random(steps) < DISTURBED
    few[rng.integers(steps)] = True
    return few.astype(float)


def truncated_normal(rng: np.random.Generator, mean: float, sigma: float) -> float:
    """A normal draw inside [-1, 1], by rejection (AMC's exploration noise)."""
    for _ in range(20 if sigma > 0 else 0):
        value = rng.normal(mean, sigma)
        if -1.0 <= value <= 1.0:
            return float(value)
    return float(np.clip(mean, -1.0, 1.0))
