from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env

from agents.view import AgentView, action_of, actions_of, even_share, share_of
from prune_env.envs import dynamics
from prune_env.envs.channel_pruning import ChannelPruningEnv
from tests.learning.toy import toy


@given(st.floats(0.02, 0.98), st.floats(0.01, 1.0))
def test_an_action_and_its_share_are_inverse(even: float, share: float) -> None:
    assert share_of(even, action_of(even, share)) == pytest.approx(share)


def test_zero_keeps_the_even_share_one_everything_minus_one_nothing() -> None:
    assert share_of(0.3, 0.0) == pytest.approx(0.3)
    assert share_of(0.3, 1.0) == pytest.approx(1.0)
    assert share_of(0.3, -1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_zeros_spend_the_budget_evenly(budget: float) -> None:
    problem = toy(budget=budget)
    env = AgentView(ChannelPruningEnv(problem))
    env.reset(seed=0)
    done, info = False, {}
    while not done:
        _, _, done, _, info = env.step(np.zeros(1, np.float32))
    shares = np.divide(info["counts"], problem.graph.full)
    # the last group also gets what rounding left of the others
    assert np.ptp(shares[:-1]) <= 1 / 8 + 1e-9
    assert abs(shares[-1] - shares[0]) <= 2 / 8 + 1e-9
    assert info["budget_met"]


def test_the_whole_budget_makes_the_even_share_one() -> None:
    problem = toy(budget=1.0)
    assert even_share(problem, dynamics.start(problem)) == 1.0


def test_actions_of_a_feasible_plan_lead_to_it() -> None:
    problem = toy()
    rng = np.random.default_rng(0)
    for _ in range(20):
        state = dynamics.start(problem)
        while not dynamics.finished(problem, state):
            state = dynamics.apply(problem, state, rng.random())
        env = AgentView(ChannelPruningEnv(problem))
        env.reset()
        for action in actions_of(problem, np.array(state.kept)):
            *_, info = env.step(np.array([action]))
        assert info["counts"] == state.kept


def test_the_view_passes_sb3s_check() -> None:
    check_env(AgentView(ChannelPruningEnv(toy())))
