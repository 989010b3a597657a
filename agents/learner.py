"""The learner: an SB3 algorithm that acts, learns from whole episodes, and can be stored without a pickle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from sb3_contrib import TQC
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, DictRolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from agents.episode import Memory, Trajectory
from agents.exploration import Explorer, Guided
from agents.features import JoinedFields
from agents.view import AgentView, View

Observations = dict[str, np.ndarray]


class Learner(ABC):
    """Acts on batches of observations, and learns from the newest episodes of a memory.

    Args:
        algorithm: Its settings.
        model: The SB3 algorithm.
        episodes: Of the whole run.
    """

    placeholder: ClassVar[Mapping[str, Any]] = {}
    """Sizes of the buffer that SB3 makes; each learner fills one of its own."""

    def __init__(self, algorithm: Algorithm, model: BaseAlgorithm, episodes: int) -> None:
        self.algorithm, self.model, self.episodes = algorithm, model, episodes

    @abstractmethod
    def act(self, seen: Observations) -> np.ndarray:
        """Actions `[n]` for a batch of observations."""

    @abstractmethod
    def learn(self, memory: Memory, returns: np.ndarray, *, last: bool) -> dict[str, float]:
        """Learn from episodes that are new; `last` if the chunk ends here. Returns what is logged."""

    @abstractmethod
    def remember(self, memory: Memory, returns: np.ndarray) -> None:
        """Take in the episodes of a run that is resumed: what was learnt from them is there already."""

    @staticmethod
    def initialise(model: BaseAlgorithm) -> None:
        """Let the deterministic policy be zero, which is the uniform plan."""
        with torch.no_grad():
            last = _last_layer(model)
            last.weight.mul_(0.01)
            last.bias.zero_()
            if isinstance(model, TD3):
                model.actor_target.load_state_dict(model.actor.state_dict())

    @abstractmethod
    def rewards(self, trajectory: Trajectory, value: float) -> np.ndarray:
        """What each step of an episode is paid for learning, `[steps]`.

        Args:
            trajectory: With what a shaper paid.
            value: Of `returns`.
        """

    @staticmethod
    def returns(paid: np.ndarray, top: float) -> np.ndarray:
        """What is learnt from: rewards with the uniform plan at 0 and the dense network at 1, clipped to [-2, 2].

        Args:
            paid: `[episodes]` rewards; the first is that of the uniform plan.
            top: The dense network's reward.
        """
        if not len(paid):
            return paid
        scale = max(abs(top - paid[0]), 0.01)
        return np.clip((paid - paid[0]) / scale, -2.0, 2.0)


class OffPolicy(Learner):
    """DDPG, TD3, SAC, TQC: learns from every episode, whoever chose its actions."""

    model: TD3 | SAC | TQC
    placeholder: ClassVar[Mapping[str, Any]] = {"buffer_size": 2}

    def __init__(self, algorithm: Algorithm, model: BaseAlgorithm, episodes: int) -> None:
        super().__init__(algorithm, model, episodes)
        self.stored = 0

    def act(self, seen: Observations) -> np.ndarray:
        """The deterministic actions; exploration adds the noise."""
        return self.model.predict(seen, deterministic=True)[0].reshape(-1)

    def learn(self, memory: Memory, returns: np.ndarray, *, last: bool) -> dict[str, float]:
        """Store the new episodes, then a few gradient and imitation steps for each."""
        new = len(memory) - self.stored
        self.remember(memory, returns)
        self.model.train(new * self.algorithm.gradient_steps, self.model.batch_size)
        steps = new * self.algorithm.imitation_steps
        loss = imitate(self.model, self.model.actor.optimizer, memory.elite(self.algorithm.elite), steps)
        return {**logged(self.model), "train/imitation_loss": loss}

    def remember(self, memory: Memory, returns: np.ndarray) -> None:
        """Copy episodes that the replay does not hold yet; each step is final and carries the episode's return."""
        for i in range(self.stored, len(memory)):
            for step, paid in enumerate(self.rewards(memory.trajectories[i], float(returns[i])).tolist()):
                self.store(memory.trajectories[i], step, paid)
            self.stored = i + 1

    def rewards(self, trajectory: Trajectory, value: float) -> np.ndarray:
        """The whole return at each step, and all that a shaper pays from there on."""
        ahead, to_go = 0.0, []
        for paid in trajectory.shaping[::-1].tolist():
            ahead = paid + self.model.gamma * ahead
            to_go.append(value + ahead)
        return np.array(to_go[::-1])

    def store(self, trajectory: Trajectory, step: int, paid: float) -> None:
        """Add a step to the replay."""
        if self.stored == 0 and step == 0:
            self.model.replay_buffer = self._buffer(len(trajectory.taken))
        seen = {name: rows[step : step + 1] for name, rows in trajectory.seen.items()}
        reward, ends = np.array([paid], dtype=np.float32), np.ones(1, dtype=np.float32)
        buffer = self.model.replay_buffer
        assert isinstance(buffer, DictReplayBuffer)
        buffer.add(seen, seen, trajectory.applied[step][None], reward, ends, [{}])

    def _buffer(self, steps: int) -> DictReplayBuffer:
        space, model = self.model.observation_space, self.model
        assert isinstance(space, spaces.Dict)
        size = max(1, self.episodes * steps)
        return DictReplayBuffer(size, space, model.action_space, "cpu", handle_timeout_termination=False)


class OnPolicy(Learner):
    """PPO: learns from what it did itself, a few episodes at a time."""

    model: OnPolicyAlgorithm
    placeholder: ClassVar[Mapping[str, Any]] = {"n_steps": 32}

    def __init__(self, algorithm: Algorithm, model: BaseAlgorithm, episodes: int) -> None:
        super().__init__(algorithm, model, episodes)
        self.used = 0

    def act(self, seen: Observations) -> np.ndarray:
        """Actions drawn from the policy."""
        with torch.no_grad():
            tensors, _ = self.model.policy.obs_to_tensor(seen)
            return self.model.policy(tensors)[0].numpy().reshape(-1)

    def learn(self, memory: Memory, returns: np.ndarray, *, last: bool) -> dict[str, float]:
        """Clipped policy gradient on its own episodes and imitation, once enough are new or the chunk is at its end."""
        if not last and len(memory) - self.used < self.algorithm.batch_episodes:
            return {}
        new = range(self.used, len(memory))
        own = [i for i in new if memory.episodes[i].source == "policy"]
        self.used = len(memory)
        if own:
            self._fill([(memory.trajectories[i], float(returns[i])) for i in own])
            self.model.train()
        steps = len(new) * self.algorithm.imitation_steps
        loss = imitate(self.model, self.model.policy.optimizer, memory.elite(self.algorithm.elite), steps)
        return {**logged(self.model), "train/imitation_loss": loss}

    def remember(self, memory: Memory, returns: np.ndarray) -> None:
        """Nothing of earlier episodes is kept."""
        self.used = len(memory)

    def rewards(self, trajectory: Trajectory, value: float) -> np.ndarray:
        """The return at the last step, and at each what a shaper pays there."""
        rewards = trajectory.shaping.copy()
        rewards[-1] += value
        return rewards

    def _fill(self, episodes: list[tuple[Trajectory, float]]) -> None:
        """A rollout buffer of whole episodes, paid at their last steps."""
        model, space = self.model, self.model.observation_space
        assert isinstance(space, spaces.Dict)
        rows = sum(len(trajectory.taken) for trajectory, _ in episodes)
        buffer = DictRolloutBuffer(
            rows, space, model.action_space, "cpu", gae_lambda=model.gae_lambda, gamma=model.gamma
        )
        for trajectory, paid in episodes:
            seen, actions = _batch([trajectory]), torch.from_numpy(trajectory.taken)
            with torch.no_grad():
                values, log_probs, _ = model.policy.evaluate_actions(seen, actions)
            rewards = self.rewards(trajectory, paid).astype(np.float32)
            for step in range(len(actions)):
                at = {name: field[step : step + 1].numpy() for name, field in seen.items()}
                reward = rewards[step : step + 1]
                begins = np.array([float(step == 0)], dtype=np.float32)
                one = slice(step, step + 1)
                buffer.add(at, trajectory.taken[one], reward, begins, values[one], log_probs[one])
        buffer.compute_returns_and_advantage(last_values=torch.zeros(1), dones=np.ones(1, dtype=np.float32))
        model.rollout_buffer = buffer


@dataclass(frozen=True)
class Algorithm:
    """One learning algorithm with its settings here.

    Attributes:
        make: Its class.
        learner: How it learns from episodes.
        view: How it sees and acts: wraps the environment.
        explorer: Makes a run's explorer from (problem, episodes=, guided=).
        settings: Keyword arguments of the class.
        policy: Keyword arguments of its policy.
        defaults: Options of a run in which it differs from the other algorithms.
        gradient_steps: Updates per episode (off-policy; AMC: per step), or passes over a batch of episodes (on-policy).
        imitation_steps: Steps toward the best episodes after each update.
        elite: How many best episodes are imitated.
        batch_episodes: Episodes per update (on-policy).
    """

    make: type[BaseAlgorithm]
    learner: type[Learner] = OffPolicy
    view: View = AgentView
    explorer: Callable[..., Explorer] = Guided
    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gradient_steps: int = 10
    imitation_steps: int = 20
    elite: int = 4
    batch_episodes: int = 1

    @property
    def discount(self) -> float:
        """Its gamma, which a shaper must share."""
        return float(self.settings["gamma"])


def make_learner(algorithm: Algorithm, venv: VecEnv, *, episodes: int, seed: int) -> Learner:
    """A fresh learner.

    Args:
        algorithm: From the table.
        venv: Gives the spaces; it shows the algorithm's view.
        episodes: Of the whole run.
        seed: Seed of the initial weights.
    """
    policy = {"features_extractor_class": JoinedFields, **algorithm.policy}
    options = {**algorithm.settings, **algorithm.learner.placeholder}
    model = algorithm.make("MultiInputPolicy", venv, policy_kwargs=policy, seed=seed, device="cpu", **options)
    model.set_logger(Logger(None, []))
    model._current_progress_remaining = 1.0
    algorithm.learner.initialise(model)
    return algorithm.learner(algorithm, model, episodes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: networks this small gain nothing from a second, and lose milliseconds whenever it is late."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def imitate(model: BaseAlgorithm, optimizer: torch.optim.Optimizer, elite: list[Trajectory], steps: int) -> float:
    """Steps of the deterministic policy toward the actions of the best episodes; returns the last squared error."""
    seen = _batch(elite)
    wanted = torch.from_numpy(np.concatenate([trajectory.applied for trajectory in elite]))
    model.policy.set_training_mode(True)
    loss = torch.zeros(())
    for _ in range(steps):
        loss = nn.functional.mse_loss(model.policy._predict(seen, deterministic=True), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.policy.set_training_mode(False)
    return float(loss.detach())


def tensors_of(model: BaseAlgorithm) -> dict[str, Tensor]:
    """Everything that learning changes: networks, optimiser moments, entropy coefficient, number of updates."""
    states, variables = model._get_torch_save_params()
    found = {f"variable/{name}": _attribute(model, name).detach().clone() for name in variables}
    for name in states:
        state = _attribute(model, name).state_dict()
        if "param_groups" not in state:
            found |= {f"{name}/{key}": value.detach().clone() for key, value in state.items()}
            continue
        for at, moments in state["state"].items():
            found |= {f"{name}/{at}/{key}": torch.as_tensor(value).clone() for key, value in moments.items()}
    return {**found, "updates": torch.tensor(model._n_updates)}


def load_tensors(model: BaseAlgorithm, tensors: dict[str, Tensor]) -> None:
    """Put back what `tensors_of` gave.

    Raises:
        ValueError: The tensors belong to another algorithm or environment.
    """
    states, variables = model._get_torch_save_params()
    try:
        for name in variables:
            _attribute(model, name).data.copy_(tensors[f"variable/{name}"])
        for name in states:
            target = _attribute(model, name)
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            target.load_state_dict(own if isinstance(target, nn.Module) else _optimizer_state(target, own))
        model._n_updates = int(tensors["updates"])
    except (KeyError, RuntimeError, SafetensorError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"the stored agent does not fit this run ({line})") from None


def _optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        at, name = key.split("/")
        moments.setdefault(int(at), {})[name] = value
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}


def _attribute(model: BaseAlgorithm, dotted: str) -> Any:
    value: Any = model
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _batch(trajectories: list[Trajectory]) -> dict[str, Tensor]:
    names = trajectories[0].seen
    return {name: torch.from_numpy(np.concatenate([t.seen[name] for t in trajectories])) for name in names}


def logged(model: BaseAlgorithm) -> dict[str, float]:
    """What the algorithm logged about its update."""
    values = {key: float(value) for key, value in model.logger.name_to_value.items() if key.startswith("train/")}
    model.logger.name_to_value.clear()
    return values


def _last_layer(model: BaseAlgorithm) -> nn.Linear:
    """The linear layer that gives the mean action."""
    for owner, name in ((model.policy, "action_net"), (getattr(model, "actor", None), "mu")):
        layer = getattr(owner, name, None)
        if layer is not None:
            return [module for module in layer.modules() if isinstance(module, nn.Linear)][-1]
    raise ValueError(f"{type(model).__name__} has no layer for its mean action")
