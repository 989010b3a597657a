"""Where an episode's actions come from: known plans, random ones, the best disturbed or guessed, or the learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from agents.episode import Memory
from agents.view import actions_of, kept_by
from baselines import amc
from baselines.method import case_of
from baselines.search import KNOWN
from baselines.surrogate import promising
from prune_env.envs.dynamics import Problem

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
        source: `uniform` or another known plan's name, `random`, `disturbed best`, `surrogate`, or `policy`.
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


@runtime_checkable
class Explorer(Protocol):
    """Decides how episodes are played; made from a problem, the run's number of episodes and those of its warm-up."""

    def draft(self, number: int, memory: Memory, rng: np.random.Generator) -> Draft:
        """Plan an episode.

        Args:
            number: Of the episode, from 0.
            memory: All episodes that are over.
            rng: Source of all randomness.
        """
        ...


class Guided:
    """Known plans first, then a mixture that depends on how far the run is; see `agents.algorithms`.

    Args:
        problem: What is decided; its actions are relative to the even share.
        episodes: Of the whole run.
        guided: Episodes of the warm-up.
        own_noise: The learner explores by itself.
    """

    def __init__(self, problem: Problem, *, episodes: int, guided: int, own_noise: bool = False) -> None:
        self.problem, self.episodes, self.guided, self.own_noise = problem, episodes, guided, own_noise
        self.known = known_actions(problem)

    def draft(self, number: int, memory: Memory, rng: np.random.Generator) -> Draft:
        """Plan an episode."""
        names = list(self.known)
        if number < len(names):
            return Draft(names[number], self.known[names[number]], np.zeros(len(self.known[names[number]])), rng)
        if memory.best is None:
            raise ValueError("the first episode must be a known plan")
        best = memory.trajectories[memory.best].applied[:, 0]
        if number < self.guided and number % 2 == 0:
            script = [truncated_normal(rng, 0.0, SIGMA_RANDOM) for _ in best]
            return Draft("random", np.array(script), np.zeros(len(best)), rng)
        sigma = SIGMA_START * (SIGMA_END / SIGMA_START) ** (number / max(self.episodes - 1, 1))
        sigma *= float(np.exp(SPREAD * rng.normal()))
        if number < self.guided or number % 2:
            script = _fresh(best, sigma, self._played(memory), rng)
            return Draft("disturbed best", script, np.zeros(len(best)), rng)
        noise = np.zeros(len(best)) if self.own_noise else sigma * _few(len(best), rng)
        return Draft("policy", None, noise, rng)

    def _played(self, memory: Memory) -> Callable[[np.ndarray], bool]:
        """Whether actions lead to a plan that the run has measured already."""
        measured = {tuple(episode.counts[step] for step in self.problem.steps) for episode in memory.episodes}
        return lambda actions: kept_by(self.problem, actions) in measured


class Surrogated:
    """As `Guided`, but all that is neither known nor the learner's own is what a surrogate finds most promising.

    The surrogate learns from every episode, the learner's own included, and the learner from its episodes. Its plans
    spend the budget, also where that is soft.

    Args:
        problem: What is decided; its actions are relative to the even share.
        episodes: Of the whole run.
        guided: Episodes of the warm-up.
    """

    def __init__(self, problem: Problem, *, episodes: int, guided: int) -> None:
        self.problem, self.usual = problem, Guided(problem, episodes=episodes, guided=guided)
        self.choices = case_of(KNOWN[0], problem).choices

    def draft(self, number: int, memory: Memory, rng: np.random.Generator) -> Draft:
        """Plan an episode."""
        usual = self.usual.draft(number, memory, rng)
        if usual.script is None or usual.source in self.usual.known:
            return usual
        counts = np.array([episode.counts for episode in memory.episodes])[:, list(self.problem.steps)]
        rewards = np.array([episode.reward for episode in memory.episodes])
        measured = {tuple(row) for row in counts.tolist()}
        found = promising(self.choices, counts / self.choices.full, rewards, measured, rng)
        return replace(usual, source="surrogate", script=actions_of(self.problem, found))


def known_actions(problem: Problem) -> dict[str, np.ndarray]:
    """Actions of the known plans, by name."""
    return {method.name: actions_of(problem, method.allocate(case_of(method, problem))) for method in KNOWN}


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
    """AMC's exploration noise over actions in [-1, 1]."""
    return amc.truncated_normal(rng, mean, sigma, low=-1.0, high=1.0)
