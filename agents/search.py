"""The search: episodes in chunks, each of which begins from seeds of its own and ends in a checkpoint.

Every chunk, in an uninterrupted run too, starts with fresh random generators that depend only on the run's seed and
the chunk's number, and with environments that are reset. So a run that was killed at any moment and resumed from its
last checkpoint goes through the same states as one that was not: same episodes, same agent, same plan. This holds on
one machine with one number of threads; it does not hold between different numbers of workers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from agents import rounds
from agents.algorithms import ALGORITHMS
from agents.config import TrainConfig
from agents.episode import Episode, Memory
from agents.learner import Learner, load_tensors, make_learner, one_thread, tensors_of
from agents.record import RunFolder
from agents.view import View
from baselines.shaping import PotentialShaping
from prune_env.envs import dynamics
from prune_env.envs.dynamics import Problem
from prune_env.files import write
from prune_env.pruning.plan import Plan


@runtime_checkable
class Observer(Protocol):
    """Watches a search."""

    def resumed(self, memory: Memory) -> None:
        """The search begins, or goes on after these episodes."""
        ...

    def played(self, episode: Episode, *, best: bool, scalars: dict[str, float]) -> None:
        """An episode is over; `best` if none was better."""
        ...

    def saved(self, memory: Memory) -> None:
        """A checkpoint is current."""
        ...


def search(
    problem: Problem, config: TrainConfig, venv: VecEnv, run: RunFolder, *, observers: Sequence[Observer] = ()
) -> tuple[Memory, Learner]:
    """Run, or resume, the episodes of a run.

    Returns:
        All episodes, and the learner as it is after them.

    Raises:
        ValueError: The run's checkpoint is corrupt or does not fit.
    """
    loop = _Search(problem, config, venv, run, tuple(observers))
    loop.restore()
    while len(loop.memory) < config.episodes:
        loop.chunk()
    return loop.memory, loop.learner


def view_of(config: TrainConfig) -> View:
    """How a run's algorithm sees and acts, shaped with its own discount if the run has a shaper."""
    algorithm, shaping = ALGORITHMS[config.algorithm], config.shaping()
    if shaping is None:
        return algorithm.view
    return lambda env: PotentialShaping(algorithm.view(env), shaping, discount=algorithm.discount)


def best_plan(problem: Problem, memory: Memory) -> Plan:
    """The plan of the best episode."""
    best = memory.best
    if best is None:
        raise ValueError("no episode has been played")
    return Plan.of_counts(problem.graph, np.array(memory.episodes[best].counts), problem.scores)


def policy_plan(problem: Problem, learner: Learner, venv: VecEnv) -> Plan:
    """The plan of the learner's deterministic policy."""
    seen, done, infos = venv.reset(), np.zeros(venv.num_envs, dtype=bool), []
    while not done.all():
        assert isinstance(seen, dict)
        seen, _, done, infos = venv.step(learner.model.predict(seen, deterministic=True)[0])
    return Plan.from_json(infos[0]["plan"])


class _Search:
    """What changes during a search."""

    def __init__(
        self, problem: Problem, config: TrainConfig, venv: VecEnv, run: RunFolder, observers: tuple[Observer, ...]
    ) -> None:
        self.problem, self.config, self.venv, self.run, self.observers = problem, config, venv, run, observers
        self.memory, self.chunks = Memory(), 0
        algorithm = ALGORITHMS[config.algorithm]
        self.learner = make_learner(algorithm, venv, episodes=config.episodes, seed=config.seed)
        self.explorer = algorithm.explorer(problem, episodes=config.episodes, guided=config.guided)
        self.top = sum(problem.reward(problem.dense, problem.dense, dynamics.start(problem).budget).values())

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one; everything written after it is forgotten."""
        stored = self.run.restore()
        if stored is not None:
            self.memory, agent, state = stored
            load_tensors(self.learner.model, agent)
            self.chunks = int(state["chunks"])
            self.learner.remember(self.memory, self.returns())
        self.run.write_episodes(self.memory.episodes)
        for observer in self.observers:
            observer.resumed(self.memory)

    def chunk(self) -> None:
        """Some rounds, then a checkpoint."""
        seed = int(np.random.SeedSequence([self.config.seed, self.chunks]).generate_state(1)[0])
        _seed_all(seed)
        rng = np.random.default_rng(seed)
        self.venv.seed(seed)
        start = len(self.memory)
        end = min(start + self.config.chunk, self.config.episodes)
        while len(self.memory) < end:
            self.round(rng, end)
        self.chunks += 1
        self.run.save(self.memory, tensors_of(self.learner.model), {"chunks": self.chunks})
        for observer in self.observers:
            observer.saved(self.memory)

    def round(self, rng: np.random.Generator, end: int) -> None:
        """An episode in each worker, then what is learnt from them."""
        first = len(self.memory)
        numbers = range(first, min(first + self.venv.num_envs, self.config.episodes))
        # a generator per episode: how many draws one takes does not move the others
        own = [np.random.default_rng(rng.integers(2**63)) for _ in numbers]
        drafts = [self.explorer.draft(number, self.memory, own[i]) for i, number in enumerate(numbers)]
        played = rounds.play(self.venv, self.learner.act, drafts, first=first, guided=self.config.guided)
        for episode, trajectory in played:
            self.memory.add(episode, trajectory)
        with one_thread():
            scalars = self.learner.learn(self.memory, self.returns(), last=len(self.memory) >= end)
        for episode, _ in played:
            self.run.append_episode(episode)
            best = self.memory.best == episode.number
            if best:
                self.write_plan()
            for observer in self.observers:
                observer.played(episode, best=best, scalars=scalars)

    def returns(self) -> np.ndarray:
        """What the learner makes of the rewards so far, `[episodes]`."""
        return self.learner.returns(np.array([episode.reward for episode in self.memory.episodes]), self.top)

    def write_plan(self) -> None:
        """The best plan so far."""
        write(self.run.path / "plan.json", best_plan(self.problem, self.memory).to_json())


def _seed_all(seed: int) -> None:
    """Seed what SB3 draws from: the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Settings worth comparing between runs, for TensorBoard's HParams."""
    names = (
        "task", "algorithm", "importance", "refit", "recalibrate", "reward", "budget", "budget_resource", "episodes",
        "seed",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names} | {"shape": config.shape or "none"}
