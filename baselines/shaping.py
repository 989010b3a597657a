"""Shapers: a paper's knowledge as a potential, paid along the way, with the best plan provably the same.

Ng, Harada, Russell, "Policy Invariance under Reward Transformations", ICML 1999 (theorem 1):

    F(s, a, s') = w (gamma Phi(s') - Phi(s)),   Phi = 0 at terminal states

Then the shaped return of an episode is the plain one less w Phi(s_0), whatever is done in between: the sum of
gamma^t F_t telescopes. That needs the agent's own gamma, and a weight w that is constant within an episode. It may
fall from episode to episode (`Shaping.episodes`).

What a learner makes of it: one that bootstraps (`amc`) hears after each step what the step did to the potential. The
others of `agents.algorithms` learn from whole returns, of which F leaves G - w Phi(s_t) at step t: the potential is a
baseline there, which changes what the critic has to fit and nothing else.

A new shaper is one function from a problem to curves (`baselines.potential`) in its paper's own file, and one line in
`SHAPERS`. They see what a state holds, which is the plan so far, and what was read off the dense network and the
calibration images once, without training. A network that a paper's `prepare` stage has trained is read as it is then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import gymnasium

from baselines import (
    channel_gating_measurement,
    directional_potential,
    merging_redundancy,
    polarization_scales,
    potential,
    provable_filter_pruning,
    scop,
)
from baselines.potential import Evidence, Potential
from prune_env.checks import check_name
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem

SHAPERS: dict[str, Evidence] = {
    "importance": potential.importance,
    "polarization": polarization_scales.separability,
    "scop": scop.evidence_kept,
    "provable_filter_pruning": provable_filter_pruning.error_bounds,
    "directional_pruning": directional_potential.beyond_free,
    "neuron_merging": merging_redundancy.unmerged,
    "channel_gating": channel_gating_measurement.energy_kept,
}
"""Name -> a problem's curves."""

TERM = "reward/shaping"
"""Where `info` carries F."""


@dataclass(frozen=True)
class Shaping:
    """Which shaper, how strong, and for how long.

    Attributes:
        name: A name in `SHAPERS`.
        weight: w at the first episode.
        episodes: Episodes over which it falls to zero in a straight line; None keeps it.

    Raises:
        ValueError: An unknown name (says the closest), or a number that is not allowed.
    """

    name: str
    weight: int | float = 1.0
    episodes: int | None = None

    def __post_init__(self) -> None:
        check_name("shaper", self.name, SHAPERS)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of shaper {self.name!r} is {self.weight}; a finite number above 0 is allowed")
        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"shaper {self.name!r} fades over {self.episodes} episodes; 1 or more are allowed")

    @classmethod
    def parse(cls, text: str) -> Shaping:
        """What `NAME[:WEIGHT[:EPISODES]]` says.

        Raises:
            ValueError: It says nothing of the kind.
        """
        name, *given = text.split(":", 2)
        try:
            weight = float(given[0]) if given else cls.weight
            episodes = int(given[1]) if given[1:] else cls.episodes
        except ValueError:
            message = f"shape is {text!r}; NAME[:WEIGHT[:EPISODES]] is allowed, say importance:0.5:100"
            raise ValueError(message) from None
        return cls(name, weight, episodes)

    def weight_at(self, episode: int) -> float:
        """The weight of an episode, counted from 0."""
        return self.weight if self.episodes is None else self.weight * max(0.0, 1 - episode / self.episodes)


_KNOWN: WeakKeyDictionary[Problem, dict[str, Potential]] = WeakKeyDictionary()


def potential_of(name: str, problem: Problem) -> Potential:
    """The potential of that name; its evidence is collected once per problem.

    Args:
        name: A name in `SHAPERS`.
        problem: What is decided.

    Raises:
        ValueError: The paper has nothing to say about this network; says why.
    """
    known = _KNOWN.setdefault(problem, {})
    if name not in known:
        try:
            known[name] = Potential.of(problem, SHAPERS[name](problem))
        except ValueError as error:
            raise ValueError(f"shaper {name!r} does not fit {problem.name}: {error}") from None
    return known[name]


def _inmost(env: gymnasium.Env) -> ChannelPruningEnv:
    inmost = env.unwrapped
    assert isinstance(inmost, ChannelPruningEnv)
    return inmost


class PotentialShaping(gymnasium.Wrapper):
    """An environment over `ChannelPruningEnv` whose rewards are shaped; `info` carries F as `reward/shaping`.

    `reset(options={"episode": n})` says which episode begins, for weights that fall; without it they are counted.

    Args:
        env: Any wrapping of `ChannelPruningEnv`.
        shaping: Which shaper, how strong, and for how long.
        discount: gamma, the agent's.

    Raises:
        ValueError: A discount outside (0, 1], or a paper that has nothing to say about this network.
    """

    def __init__(self, env: gymnasium.Env, shaping: Shaping, *, discount: int | float) -> None:
        super().__init__(env)
        if not 0 < discount <= 1:
            raise ValueError(f"discount is {discount!r}; the agent's, in (0, 1], is allowed")
        self.shaping, self.discount = shaping, discount
        self.potential = potential_of(shaping.name, _inmost(env).problem)
        self._episode, self._weight, self._before = -1, 0.0, 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        others = dict(options or {})
        episode = others.pop("episode", self._episode + 1)
        seen, info = self.env.reset(seed=seed, options=others)
        self._episode, self._weight = episode, self.shaping.weight_at(episode)
        self._before = self.potential(_inmost(self.env).state)
        return seen, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Decide the next group."""
        seen, reward, terminated, truncated, info = self.env.step(action)
        after = 0.0 if terminated else self.potential(_inmost(self.env).state)
        info[TERM] = self._weight * (self.discount * after - self._before)
        self._before = after
        return seen, float(reward) + info[TERM], terminated, truncated, info
