"""Episodes: what is recorded of each, and the memory that the learner draws from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

PHASES = WARM_UP, LEARNING = ("warm-up", "learning")


@dataclass(frozen=True)
class Episode:
    """One network that was cut and measured on the search split.

    Attributes:
        number: From 0.
        phase: `warm-up` or `learning`.
        source: Where its actions came from.
        reward: As paid by the environment.
        accuracy: On the search split.
        loss: On the search split, nats per image.
        macs: Of the cut network.
        params: Of the cut network.
        counts: Channels kept per group of the graph.
        terms: Terms of the reward.
        steps: Optimiser steps that the measurement took.
        rungs: Accuracy at each place where its training could be stopped.
    """

    number: int
    phase: str
    source: str
    reward: float
    accuracy: float
    loss: float
    macs: int
    params: int
    counts: tuple[int, ...]
    terms: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    rungs: tuple[float, ...] = ()

    @property
    def rank(self) -> tuple[float, float]:
        """What the best episode has most of: reward, and among equals the lower loss."""
        return self.reward, -self.loss


@dataclass(frozen=True)
class Trajectory:
    """What the learner sees of an episode.

    Attributes:
        seen: Field -> `[steps, width]` observations.
        taken: `[steps, 1]` actions as the draft chose them.
        applied: `[steps, 1]` actions as they were really applied.
        shaping: `[steps]` what a shaper paid on the way, zeros without one; no part of the episode's reward.
    """

    seen: dict[str, np.ndarray]
    taken: np.ndarray
    applied: np.ndarray
    shaping: np.ndarray


class Memory:
    """All episodes of a run with their trajectories, in order; only ever appended to."""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []
        self.trajectories: list[Trajectory] = []

    def __len__(self) -> int:
        return len(self.episodes)

    def add(self, episode: Episode, trajectory: Trajectory) -> None:
        """Append one."""
        self.episodes.append(episode)
        self.trajectories.append(trajectory)

    @property
    def best(self) -> int | None:
        """Number of the best episode; the earliest among equals."""
        return max(range(len(self)), key=lambda i: (*self.episodes[i].rank, -i), default=None)

    def elite(self, number: int) -> list[Trajectory]:
        """Trajectories of the best episodes."""
        order = sorted(range(len(self)), key=lambda i: (*self.episodes[i].rank, -i), reverse=True)
        return [self.trajectories[i] for i in order[:number]]

    def tensors(self) -> dict[str, np.ndarray]:
        """The trajectories as arrays `[episodes, steps, width]`, for a checkpoint."""
        if not self.trajectories:
            return {}
        whole = {
            f"seen/{name}": np.stack([t.seen[name] for t in self.trajectories]) for name in self.trajectories[0].seen
        }
        whole["taken"] = np.stack([t.taken for t in self.trajectories])
        whole["applied"] = np.stack([t.applied for t in self.trajectories])
        whole["shaping"] = np.stack([t.shaping for t in self.trajectories])
        return whole

    @classmethod
    def of(cls, episodes: list[Episode], tensors: dict[str, np.ndarray]) -> Memory:
        """The memory whose episodes and `tensors()` these are."""
        memory = cls()
        fields = {name.removeprefix("seen/"): rows for name, rows in tensors.items() if name.startswith("seen/")}
        for i, episode in enumerate(episodes):
            seen = {name: rows[i] for name, rows in fields.items()}
            taken, applied = tensors["taken"][i], tensors["applied"][i]
            # a run that began before there were shapers has stored none
            shaping = tensors["shaping"][i] if "shaping" in tensors else np.zeros(len(taken))
            memory.add(episode, Trajectory(seen, taken, applied, shaping))
        return memory
