"""AMC as an SB3 agent: DDPG on the paper's state, noise, credit and baseline. What is published: `baselines.amc`."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import DDPG
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from torch import Tensor

from agents.episode import LEARNING, Memory, Trajectory
from agents.exploration import Draft
from agents.learner import Algorithm, OffPolicy, logged
from baselines import amc
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem


class AmcView(gymnasium.Wrapper):
    """`ChannelPruningEnv` with the paper's state, and actions in [-1, 1] for ratios in [0, 1].

    | Field | Length | Meaning |
    |-------|--------|---------|
    | `layer` | 11 | `baselines.amc.FEATURES` |

    `info["action"]` is the action for the ratio that was really applied, after rounding and the budget.
    """

    def __init__(self, env: ChannelPruningEnv) -> None:
        super().__init__(env)
        self.core = env
        self.observation_space = spaces.Dict({"layer": spaces.Box(0.0, 1.0, (len(amc.FEATURES),), np.float32)})
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._known = amc.known_features(env.problem)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        _, info = self.core.reset(seed=seed, options=options)
        return self._seen(), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Decide the next group, `[1]`."""
        problem, at = self.core.problem, self.core.state.position
        ratio = (1.0 + float(np.asarray(action).item())) / 2
        keep = amc.rounded_up(problem.allowed[at], problem.channels[at], ratio)
        _, reward, terminated, truncated, info = self.core.step(np.array([keep], dtype=np.float32))
        info["action"] = 2 * info["applied"] - 1.0
        return self._seen(), float(reward), terminated, truncated, info

    def _seen(self) -> dict[str, np.ndarray]:
        return {"layer": amc.state_of(self.core.problem, self._known, self.core.state)}


class AmcExplorer:
    """Uniformly random episodes, then the learner's own with the noise of eq. 2.

    Args:
        preset: Its width.
        problem: What is decided.
        episodes: Of the whole run.
        guided: Of the warm-up.
    """

    def __init__(self, preset: amc.Preset, problem: Problem, *, episodes: int, guided: int) -> None:
        self.preset, self.steps, self.guided = preset, len(problem.steps), guided

    def draft(self, number: int, memory: Memory, rng: np.random.Generator) -> Draft:
        """Plan an episode."""
        if number < self.guided:
            return Draft("random", rng.uniform(-1.0, 1.0, self.steps), np.zeros(self.steps), rng)
        # actions are twice as wide as ratios
        width = 2 * self.preset.width(number - self.guided)
        return Draft("policy", None, np.full(self.steps, width), rng)


class BaselinedReplay(DictReplayBuffer):
    """A replay that takes the moving baseline off the rewards of each batch (eq. 3).

    Attributes:
        baseline: Scalar, moved in place.
        rate: How far it moves.
    """

    baseline: Tensor
    rate: float

    def sample(self, batch_size: int, env: Any = None) -> DictReplayBufferSamples:
        """A batch; its own mean is in the baseline already, as in the authors' code."""
        batch = super().sample(batch_size, env=env)
        moved = amc.moved_baseline(float(self.baseline), batch.rewards.numpy().reshape(-1), rate=self.rate)
        self.baseline.fill_(moved)
        return batch._replace(rewards=batch.rewards - moved)


class AmcDDPG(DDPG):
    """DDPG whose actor and critic have learning rates of their own, and which carries the baseline of eq. 3.

    Args:
        *arguments: Of DDPG.
        preset: The learning rates.
        **options: Of DDPG.

    Attributes:
        baseline: Scalar float64, NaN before the first update.
    """

    def __init__(self, *arguments: Any, preset: amc.Preset, **options: Any) -> None:
        super().__init__(*arguments, learning_rate=preset.actor_lr, **options)
        self.preset = preset
        self.baseline = torch.full((), torch.nan, dtype=torch.float64)
        for parameters in self.critic.optimizer.param_groups:
            parameters["lr"] = preset.critic_lr

    def _update_learning_rate(self, optimizers: Any) -> None:
        """Both are constant; SB3 would give one to both."""

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        states, variables = super()._get_torch_save_params()
        return states, [*variables, "baseline"]


class AmcLearner(OffPolicy):
    """Stores each step with the whole episode's reward; after the warm-up, an update follows each of them."""

    model: AmcDDPG

    @staticmethod
    def initialise(model: BaseAlgorithm) -> None:
        """The authors leave PyTorch's own initialisation, and so does SB3."""

    @staticmethod
    def returns(paid: np.ndarray, top: float) -> np.ndarray:
        """The rewards themselves."""
        return paid

    def learn(self, memory: Memory, returns: np.ndarray, *, last: bool) -> dict[str, float]:
        """Store and update in turns."""
        for i in range(self.stored, len(memory)):
            learning = memory.episodes[i].phase == LEARNING
            for step, paid in enumerate(self.rewards(memory.trajectories[i], float(returns[i])).tolist()):
                self.store(memory.trajectories[i], step, paid)
                if learning:
                    self.model.train(self.algorithm.gradient_steps, self.model.batch_size)
            self.stored = i + 1
        said = logged(self.model)
        return {**said, "train/baseline": float(self.model.baseline)} if said else {}

    def rewards(self, trajectory: Trajectory, value: float) -> np.ndarray:
        """The whole reward at each step, as published, and what a shaper pays there: the critic bootstraps the rest."""
        return value + trajectory.shaping

    def store(self, trajectory: Trajectory, step: int, paid: float) -> None:
        """Add a step to the replay: what the actor asked for, not what the budget made of it."""
        if self.stored == 0 and step == 0:
            self.model.replay_buffer = self._buffer(len(trajectory.taken))
        last = len(trajectory.taken) - 1
        now, after = (
            {name: rows[at : at + 1] for name, rows in trajectory.seen.items()} for at in (step, min(step + 1, last))
        )
        ends = np.array([float(step == last)], dtype=np.float32)
        reward = np.array([paid], dtype=np.float32)
        buffer = self.model.replay_buffer
        assert isinstance(buffer, DictReplayBuffer)
        buffer.add(now, after, trajectory.taken[step][None], reward, ends, [{}])

    def _buffer(self, steps: int) -> DictReplayBuffer:
        preset, space = self.model.preset, self.model.observation_space
        assert isinstance(space, spaces.Dict)
        size = preset.replay_episodes * steps
        buffer = BaselinedReplay(size, space, self.model.action_space, "cpu", handle_timeout_termination=False)
        buffer.baseline, buffer.rate = self.model.baseline, preset.baseline_rate
        return buffer


def amc_of(preset: amc.Preset) -> Algorithm:
    """A preset as an algorithm."""
    return Algorithm(
        AmcDDPG,
        learner=AmcLearner,
        view=AmcView,
        explorer=partial(AmcExplorer, preset),
        settings={"preset": preset, "batch_size": preset.batch_size, "gamma": preset.gamma, "tau": preset.tau},
        policy={"net_arch": list(preset.hidden), "features_extractor_class": CombinedExtractor},
        defaults=preset.options,
        gradient_steps=preset.updates,
        imitation_steps=0,
    )
