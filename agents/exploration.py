"""Where an episode's actions come from: known plans, random ones, the best disturbed, or the learner with noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIGMA_START, SIGMA_END = 0.4, 0.05
"""Width of the noise at the start and the end of a run, in relative actions (the range is [-1, 1])."""
SIGMA_RANDOM = 0.6
"""Width of a random plan around the uniform one."""
SPREAD = 0.7
"""Standard deviation of the logarithm of an episode's own width around that: some episodes look far, some near."""
DISTURBED = 0.3
"""Share of an episode's steps that are disturbed: a change in few groups can be told from the rest."""


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
    disturbed = rng.random(len(best)) < DISTURBED
    disturbed[rng.integers(len(best))] = True
    noise = np.where(disturbed, sigma, 0.0)
    if episode < guided or episode % 2:
        script = [truncated_normal(rng, mean, width) for mean, width in zip(best.tolist(), noise, strict=True)]
        return Draft("disturbed best", np.array(script), noise, rng)
    return Draft("policy", None, np.zeros(len(best)) if own_noise else noise, rng)


def truncated_normal(rng: np.random.Generator, mean: float, sigma: float) -> float:
    """A normal draw inside [-1, 1], by rejection (AMC's exploration noise)."""
    for _ in range(20 if sigma > 0 else 0):
        value = rng.normal(mean, sigma)
        if -1.0 <= value <= 1.0:
            return float(value)
    return float(np.clip(mean, -1.0, 1.0))
