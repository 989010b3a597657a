"""Methods as policies: SB3's own evaluation takes them, and the env arrives at the method's plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import baselines
from baselines import METHODS, CountsPolicy, policy, prune
from baselines.method import case_of, given_repair, given_scores, unprepared
from prune_env.config import make_problem
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem
from prune_env.pruning.plan import Plan
from prune_env.tasks.task import Task
from tests.methods.own_tasks import own_task

ALLOCATIONS = [
    name for name, entry in METHODS.items() if entry.importance is given_scores and entry.repair is given_repair
]
"""Methods that only allocate. The env ranks and repairs as its problem says, so with others it arrives elsewhere."""
SOME = ("uniform", "random", "error_curves", "cem")
"""Of which the fast suite takes these, where what is tested is hardly the method's."""
OPTIONS: dict[str, Any] = {"recalibrate": False, "refit": "none", "calibration_images": 96}


@pytest.fixture(scope="module", params=["chain", "residual"])
def task(request: pytest.FixtureRequest) -> Task:
    return own_task(request.param)


@pytest.fixture(scope="module")
def problem(task: Task) -> Problem:
    return baselines.make_problem(task, budget=0.5, **OPTIONS)


@pytest.fixture(scope="module")
def pose(task: Task, problem: Problem) -> Callable[[str], Problem]:
    """The problem of the network that a method prepared: what its policy is made for."""

    @cache
    def posed(method: str) -> Problem:
        prepare = METHODS[method].prepare
        return problem if prepare is unprepared else make_problem(prepare(task, 0, None), budget=0.5, **OPTIONS)

    return posed


def played(env: ChannelPruningEnv, player: Any, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The info at the end of an episode."""
    seen, info = env.reset(seed=0, options=options)
    over = False
    while not over:
        action, _ = player.predict(seen, deterministic=True)
        seen, _, over, _, info = env.step(action)
        assert not info["clamped"]
    return info


@pytest.mark.parametrize("method", METHODS)
def test_the_env_arrives_at_the_methods_counts(pose: Callable[[str], Problem], method: str) -> None:
    problem = pose(method)
    info = played(ChannelPruningEnv(problem=problem), policy(method, problem, seed=4))
    counts = METHODS[method].allocate(case_of(METHODS[method], problem, seed=4))
    np.testing.assert_array_equal(np.array(info["counts"])[list(problem.steps)], counts)
    assert info["budget_met"]


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_the_env_arrives_at_the_methods_plan(task: Task, pose: Callable[[str], Problem], method: str) -> None:
    problem = pose(method)
    info = played(ChannelPruningEnv(problem=problem), policy(method, problem, seed=0))
    assert Plan.from_json(info["plan"]) == prune(method, task, budget=0.5, seed=0, **OPTIONS).plan


@pytest.mark.parametrize(
    "method", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ALLOCATIONS]
)
def test_sb3_evaluates_a_policy_and_reports_the_methods_accuracy(
    task: Task, pose: Callable[[str], Problem], method: str
) -> None:
    problem = pose(method)
    envs = DummyVecEnv([lambda: Monitor(ChannelPruningEnv(problem=problem)) for _ in range(2)])
    reward, spread = evaluate_policy(policy(method, problem), envs, n_eval_episodes=3)
    assert reward == pytest.approx(prune(method, task, budget=0.5, **OPTIONS).search.accuracy)
    assert spread == 0


@pytest.mark.parametrize("method", ["uniform", "error_curves"])
def test_a_policy_without_a_budget_follows_the_one_it_observes(task: Task, problem: Problem, method: str) -> None:
    env, player = ChannelPruningEnv(problem=problem), policy(method, problem)
    for budget in (0.35, 0.8, 1.0):
        info = played(env, player, {"budget": budget})
        expected = prune(method, task, budget=budget, **OPTIONS)
        assert info["macs"] == expected.search.macs
        assert Plan.from_json(info["plan"]) == expected.plan


def test_a_policy_with_a_budget_keeps_to_it(task: Task, problem: Problem) -> None:
    info = played(ChannelPruningEnv(problem=problem), policy("uniform", problem, budget=0.4), {"budget": 0.8})
    assert Plan.from_json(info["plan"]) == prune("uniform", task, budget=0.4, **OPTIONS).plan


def test_a_batch_is_answered_row_by_row_each_at_its_own_step_and_budget(problem: Problem) -> None:
    envs = [ChannelPruningEnv(problem=problem) for _ in range(2)]
    first, _ = envs[0].reset(options={"budget": 0.3})
    envs[1].reset(options={"budget": 0.9})
    second, *_ = envs[1].step(np.array([1.0], dtype=np.float32))
    player, state = policy("uniform", problem), (np.zeros(2),)
    batch = {name: np.stack([first[name], second[name]]) for name in first}
    actions, same = player.predict(batch, state, np.array([True, False]))
    assert same is state
    assert actions.shape == (2, 1)
    assert actions.dtype == np.float32
    for seen, action in zip((first, second), actions, strict=True):
        np.testing.assert_array_equal(player.predict(seen)[0], action)


def test_given_counts_are_played_exactly(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    env = ChannelPruningEnv(problem=problem)
    for _ in range(5):
        counts = np.array([rng.choice(levels) for levels in problem.allowed])
        info = played(env, CountsPolicy(problem, counts), {"budget": 1.0})
        np.testing.assert_array_equal(np.array(info["counts"])[list(problem.steps)], counts)


def test_a_policy_is_refused_what_its_method_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match="did you mean 'greedy'"):
        policy("gredy", problem)
    with pytest.raises(ValueError, match="minimum"):
        policy("uniform", problem, budget=1e-9)
