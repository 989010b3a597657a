"""The environment as the agents see it: symmetric actions relative to the even share, and a memory of the plan.

The *even share* of a state is the share which, kept in this and all later groups, spends exactly what is left. The
action a in [-1, 1] says how far to leave it: 0 keeps the even share, 1 keeps the whole group, -1 nothing of it. So zero
is the uniform plan at any budget, and what one group takes, all later ones give evenly: without this, noise in early
groups leaves the last ones at their minimum and the episode teaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from prune_env.envs import dynamics
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem, State

GRID = np.linspace(0.0, 1.0, 65)

View = Callable[[ChannelPruningEnv], gymnasium.Env]
"""Wraps an environment as an algorithm sees it: actions `[1]` in [-1, 1], and those really applied in `info`."""


class AgentView(gymnasium.Wrapper):
    """`ChannelPruningEnv` with relative actions in [-1, 1] and two more fields.

    | Field | Length | Meaning |
    |-------|--------|---------|
    | `even` | 1 | the even share |
    | `kept` | steps | share kept in each decided group, 0 for the open ones: the state has the Markov property |

    `info["action"]` is the relative action that was really applied, after rounding and the budget.
    """

    def __init__(self, env: ChannelPruningEnv) -> None:
        super().__init__(env)
        self.core = env
        unit = {"even": 1, "kept": len(env.problem.steps)}
        own = {name: spaces.Box(0.0, 1.0, (width,), np.float32) for name, width in unit.items()}
        space = env.observation_space
        assert isinstance(space, spaces.Dict)
        self.observation_space = spaces.Dict({**space, **own})
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._even = 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        seen, info = self.core.reset(seed=seed, options=options)
        return self._extended(seen), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Decide the next group, `[1]` relative to the even share."""
        even = self._even
        keep = share_of(even, float(np.asarray(action).item()))
        seen, reward, terminated, truncated, info = self.core.step(np.array([keep], dtype=np.float32))
        info["action"] = action_of(even, info["applied"])
        return self._extended(seen), float(reward), terminated, truncated, info

    def _extended(self, seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        problem, state = self.core.problem, self.core.state
        self._even = even_share(problem, state)
        kept = np.zeros(len(problem.steps), dtype=np.float32)
        kept[: state.position] = np.divide(state.kept, problem.channels[: state.position])
        return {**seen, "even": np.array([self._even], dtype=np.float32), "kept": kept}


def even_share(problem: Problem, state: State) -> float:
    """The share that, kept in every open group, spends the rest of the budget; 1 where nothing is left to decide."""
    ahead = list(problem.steps[state.position :])
    if not ahead:
        return 1.0
    full = problem.graph.full
    rows = np.tile(dynamics.counts(problem, state), (len(GRID), 1))
    least = np.array([counts[0] for counts in problem.allowed[state.position :]])
    rows[:, ahead] = np.maximum(np.rint(GRID[:, None] * full[ahead]).astype(np.int64), least)
    costs = np.asarray(problem.graph.cost[problem.resource](rows), dtype=np.float64)
    fits = int(np.searchsorted(costs, state.budget.limit, side="right"))
    if fits in (0, len(GRID)):
        return float(GRID[1] if fits == 0 else 1.0)
    below, above = costs[fits - 1], costs[fits]
    return float(max(GRID[1], GRID[fits - 1] + (state.budget.limit - below) / (above - below) * (GRID[1] - GRID[0])))


def share_of(even: float, action: float) -> float:
    """The share that a relative action keeps."""
    return even + action * (1.0 - even) if action > 0 else even * (1.0 + action)


def action_of(even: float, share: float) -> float:
    """The relative action that keeps a share: the inverse of `share_of`."""
    if share > even:
        return float(min(1.0, (share - even) / (1.0 - even)))
    return float(max(-1.0, share / even - 1.0))


def kept_by(problem: Problem, actions: np.ndarray) -> tuple[int, ...]:
    """Channels kept in each step by relative actions `[steps]`: an episode without its measurement."""
    state = dynamics.start(problem)
    for action in actions.tolist():
        state = dynamics.apply(problem, state, share_of(even_share(problem, state), action))
    return state.kept


def actions_of(problem: Problem, kept: np.ndarray) -> np.ndarray:
    """The relative actions that lead to a plan.

    Args:
        problem: What is decided.
        kept: `[steps]` channels to keep.

    Returns:
        `[steps]` float32.
    """
    state, actions = dynamics.start(problem), []
    for count, whole in zip(np.asarray(kept).tolist(), problem.channels, strict=True):
        actions.append(action_of(even_share(problem, state), count / whole))
        state = dynamics.apply(problem, state, count / whole)
    return np.array(actions, dtype=np.float32)
