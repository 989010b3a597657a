"""Shapers in a run: what is learned from, what is recorded, what a resumed run and several workers make of them."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from agents import train
from agents.algorithms import ALGORITHMS
from agents.amc import AmcLearner
from agents.config import TrainConfig
from agents.episode import Memory
from agents.exploration import Draft
from agents.learner import OnPolicy, make_learner
from agents.record import RunFolder
from agents.rounds import make_workers, play
from agents.search import best_plan, search, view_of
from baselines.shaping import PotentialShaping, Shaping
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.tasks.networks import make_network
from tests.learning.test_search import Stop
from tests.learning.toy import toy

CONFIG = TrainConfig(budget=0.4, episodes=12, chunk=4, warm_up=6, shape="importance:0.5:8")
PLAIN = replace(CONFIG, shape=None)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Memory, RunFolder]]:
    """A run with a shaper and one without."""
    found = {}
    for name, config in (("shaped", CONFIG), ("plain", PLAIN)):
        run = RunFolder.create(tmp_path_factory.mktemp(name) / "run", config)
        with closing(make_workers(toy(), config.env(), workers=1, view=view_of(config))) as venv:
            found[name] = search(toy(), config, venv, run)[0], run
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_shaper_has_the_discount_of_the_agent(algorithm: str) -> None:
    config = TrainConfig.of(algorithm, shape="importance", budget=0.4)
    env = view_of(config)(ChannelPruningEnv(toy()))
    with closing(make_workers(toy(), config.env(), workers=1, view=view_of(config))) as venv:
        learner = make_learner(ALGORITHMS[algorithm], venv, episodes=3, seed=0)
    assert isinstance(env, PotentialShaping)
    assert env.discount == learner.model.gamma == ALGORITHMS[algorithm].discount


@pytest.mark.parametrize("algorithm", ["td3", "ppo", "amc"])
def test_what_is_learned_from_differs_by_the_potential_alone(algorithm: str) -> None:
    config = TrainConfig.of(algorithm, shape="importance:0.5", budget=0.4)
    env = view_of(config)(ChannelPruningEnv(toy()))
    with closing(make_workers(toy(), config.env(), workers=1, view=view_of(config))) as venv:
        learner = make_learner(ALGORITHMS[algorithm], venv, episodes=3, seed=0)
        explorer = ALGORITHMS[algorithm].explorer(toy(), episodes=3, guided=3)
        draft = explorer.draft(0, Memory(), np.random.default_rng(0))
        ((_, trajectory),) = play(venv, learner.act, [draft], first=0, guided=3)
    env.reset()
    before = []
    for action in trajectory.applied:
        before.append(0.5 * env.potential(env.unwrapped.state))
        env.step(action)
    after = [*before[1:], 0.0]
    assert min(before) < 0
    steps = np.subtract(after, before)
    assert trajectory.shaping == pytest.approx(steps)
    rewards = learner.rewards(trajectory, 0.75)
    if isinstance(learner, AmcLearner):
        assert rewards == pytest.approx(0.75 + steps)
    elif isinstance(learner, OnPolicy):
        assert rewards == pytest.approx([*steps[:-1], steps[-1] + 0.75])
    else:
        assert rewards == pytest.approx(0.75 - np.array(before))
    assert learner.rewards(replace(trajectory, shaping=np.zeros(5)), 0.75).sum() in (0.75, 5 * 0.75)


def test_the_record_and_the_best_plan_know_nothing_of_it(played: dict[str, tuple[Memory, RunFolder]]) -> None:
    memory, run = played["shaped"]
    for episode in memory.episodes:
        assert episode.terms == {"accuracy": episode.accuracy}
        assert episode.reward == episode.accuracy
    # known and random plans are chosen before anything is learned
    assert memory.episodes[:5] == played["plain"][0].episodes[:5]
    best = max(memory.episodes, key=lambda episode: episode.rank)
    assert run.plan == best_plan(toy(), memory)
    assert memory.best == best.number
    assert run.config.shape == json.loads((run.path / "config.json").read_text())["shape"] == "importance:0.5:8"


def test_the_weight_falls_by_the_number_of_the_episode(played: dict[str, tuple[Memory, RunFolder]]) -> None:
    memory, _ = played["shaped"]
    env = PotentialShaping(ChannelPruningEnv(toy()), Shaping("importance", 1.0), discount=1.0)
    for episode, trajectory in zip(memory.episodes, memory.trajectories, strict=True):
        env.reset()
        kept = np.divide(episode.counts, 8)
        paid = [env.step(np.array([share], dtype=np.float32))[4]["reward/shaping"] for share in kept]
        assert trajectory.shaping == pytest.approx(0.5 * max(0, 1 - episode.number / 8) * np.array(paid))
    assert all((trajectory.shaping == 0).all() for trajectory in memory.trajectories[8:])
    assert all((trajectory.shaping == 0).all() for trajectory in played["plain"][0].trajectories)


def test_a_resumed_run_is_shaped_as_if_it_had_not_stopped(
    played: dict[str, tuple[Memory, RunFolder]], tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "torn", CONFIG)
    for stops in ((Stop(6),), ()):
        with closing(make_workers(toy(), CONFIG.env(), workers=1, view=view_of(CONFIG))) as venv:
            if stops:
                with pytest.raises(KeyboardInterrupt):
                    search(toy(), CONFIG, venv, run, observers=stops)
            else:
                again, _ = search(toy(), CONFIG, venv, run)
    memory, whole = played["shaped"]
    assert again.episodes == memory.episodes
    pairs = zip(again.trajectories, memory.trajectories, strict=True)
    assert all(np.array_equal(one.shaping, other.shaping) for one, other in pairs)
    assert run.plan == whole.plan


def test_a_checkpoint_of_a_run_without_shapers_still_loads(played: dict[str, tuple[Memory, RunFolder]]) -> None:
    memory, _ = played["plain"]
    tensors = memory.tensors()
    del tensors["shaping"]
    again = Memory.of(memory.episodes, tensors)
    assert [len(trajectory.shaping) for trajectory in again.trajectories] == [5] * 12
    assert not any(trajectory.shaping.any() for trajectory in again.trajectories)


def test_a_run_says_its_shaper_in_its_name() -> None:
    assert "td3-shape-importance_0.5_8-l1" in CONFIG.name
    assert "shape" not in PLAIN.name
    assert replace(CONFIG, shape="scop").name != replace(CONFIG, shape="scop:2").name != PLAIN.name


def test_a_network_that_a_paper_says_nothing_of_is_refused_before_there_is_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = make_network("lenet300100", classes=10, channels=1, side=8, seed=0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "dense.safetensors")
    words = ["--task", "digits-lenet300100", "--weights", str(tmp_path / "dense.safetensors"), "--episodes", "3"]
    assert train.main([*words, "--shape", "channel_gating", "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "shaper 'channel_gating' does not fit digits-lenet300100: the network has no convolution" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def played_in(venv: VecEnv, drafts: list[Draft]) -> list[np.ndarray]:
    """What shapers pay in episodes from the third on, one in each worker."""
    with closing(venv):
        found = play(venv, lambda seen: np.zeros(venv.num_envs), drafts, first=2, guided=4)
    return [trajectory.shaping for _, trajectory in found]


def test_workers_are_shaped_by_the_numbers_of_their_episodes() -> None:
    view = view_of(replace(CONFIG, shape="importance:1:4"))
    explorer = ALGORITHMS["td3"].explorer(toy(), episodes=4, guided=4)
    uniform = explorer.draft(0, Memory(), np.random.default_rng(0))
    third, fourth = played_in(DummyVecEnv([lambda: view(ChannelPruningEnv(toy()))] * 3), [uniform, uniform])
    assert (third != 0).any()
    assert fourth == pytest.approx(third / 2)  # weights 1/2 and 1/4


@pytest.mark.slow
def test_workers_in_processes_of_their_own_are_shaped_alike(tmp_path: Path) -> None:
    tensors = make_network("cnn", classes=10, channels=1, side=8, seed=0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "dense.safetensors")
    weights = str(tmp_path / "dense.safetensors")
    config = TrainConfig(weights=weights, shape="scop:1:4", calibration_images=32, refit="none")
    problem, view = train.problem_of(train.make_task_of(config), config), view_of(config)
    uniform = ALGORITHMS["td3"].explorer(problem, episodes=4, guided=4).draft(0, Memory(), np.random.default_rng(0))
    here = played_in(DummyVecEnv([lambda: view(ChannelPruningEnv(problem))] * 2), [uniform, uniform])
    there = played_in(make_workers(problem, config.env(), workers=2, view=view), [uniform, uniform])
    assert np.abs(here).max() > 0
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-7)
