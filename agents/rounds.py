"""Rounds: one whole episode in each worker, played at the same time."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from agents.episode import PHASES, Episode, Trajectory
from agents.exploration import Draft
from agents.learner import one_thread
from agents.view import AgentView, View
from baselines.shaping import TERM, PotentialShaping
from prune_env.config import EnvConfig, make
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem

Row = tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""A step of all workers: observations; actions as drafted, actions as applied, what a shaper paid."""


def make_workers(problem: Problem, config: EnvConfig, *, workers: int, view: View = AgentView) -> VecEnv:
    """One environment here, or several in processes of their own, each of which builds the problem anew.

    Args:
        problem: Used when there is one worker.
        config: What processes build theirs from.
        workers: How many.
        view: The algorithm's.
    """
    if workers == 1:
        return DummyVecEnv([lambda: view(ChannelPruningEnv(problem))])
    return SubprocVecEnv([partial(_remote, config, view)] * workers)


def _remote(config: EnvConfig, view: View) -> gymnasium.Env:
    # Ctrl-C reaches the whole process group; the main process ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Two processes with two threads each stall one another (OpenMP spins), so a worker has one.
    torch.set_num_threads(1)
    return view(ChannelPruningEnv(make(config)))


def play(
    venv: VecEnv, act: Callable[[dict[str, np.ndarray]], np.ndarray], drafts: list[Draft], *, first: int, guided: int
) -> list[tuple[Episode, Trajectory]]:
    """Play one episode in each of the first workers.

    Args:
        venv: All workers; episodes have the same number of steps in each.
        act: The learner's actions `[n]` for a batch of observations.
        drafts: How each episode is played; workers beyond them play zeros, which is not recorded.
        first: Number of the first draft's episode.
        guided: Episodes of the warm-up.
    """
    idle = Draft("idle", np.zeros_like(drafts[0].noise), drafts[0].noise, drafts[0].rng)
    playing = drafts + [idle] * (venv.num_envs - len(drafts))
    rows: list[Row] = []
    if any(venv.env_is_wrapped(PotentialShaping)):
        venv.set_options([{"episode": first + i} for i in range(venv.num_envs)])
    seen, done, infos = venv.reset(), np.zeros(venv.num_envs, dtype=bool), []
    learner_acts = any(one.script is None for one in drafts)
    while not done.all():
        assert isinstance(seen, dict)
        with one_thread():
            chosen = act(seen) if learner_acts else np.zeros(venv.num_envs)
        taken = np.array([[one.action(len(rows), float(chosen[i]))] for i, one in enumerate(playing)], np.float32)
        after, _, done, infos = venv.step(np.clip(taken, -1.0, 1.0))
        applied = np.array([[info["action"]] for info in infos], dtype=np.float32)
        rows.append((seen, (taken, applied, np.array([info.get(TERM, 0.0) for info in infos]))))
        seen = after
    number = range(first, first + len(drafts))
    return [
        (_episode(number[i], drafts[i].source, number[i] < guided, infos[i]), _trajectory(rows, i))
        for i in range(len(drafts))
    ]


def _episode(number: int, source: str, guided: bool, info: dict[str, Any]) -> Episode:
    """The record of an episode, from the last step's info (a VecEnv rounds rewards to float32, info does not)."""
    paid = {key: float(value) for key, value in info.items() if key.startswith("reward/") and key != TERM}
    terms = {key.removeprefix("reward/"): value for key, value in paid.items()}
    return Episode(
        number,
        PHASES[0 if guided else 1],
        source,
        sum(terms.values()),
        float(info["accuracy"]),
        float(info["loss"]),
        int(info["macs"]),
        int(info["params"]),
        info["counts"],
        terms,
        info["steps"],
    )


def _trajectory(rows: list[Row], worker: int) -> Trajectory:
    """One worker's share of a round."""
    seen = {name: np.stack([row[0][name][worker] for row in rows]) for name in rows[0][0]}
    taken, applied, shaping = (np.stack([numbers[at][worker] for _, numbers in rows]) for at in range(3))
    return Trajectory(seen, taken, applied, shaping)
