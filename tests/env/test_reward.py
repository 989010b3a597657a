"""Rewards against hand-worked numbers."""

from __future__ import annotations

import math

import pytest

from prune_env.envs.reward import REWARDS, reward_of
from prune_env.pruning.measure import Budget, Measurement

DENSE = Measurement(accuracy=0.9, loss=0.3, macs=1000, params=200)
PRUNED = Measurement(accuracy=0.75, loss=0.8, macs=560, params=80)
HALF = Budget(resource="macs", limit=500.0, fraction=0.5)


def test_accuracy_is_the_accuracy():
    assert REWARDS["accuracy"](DENSE, PRUNED, HALF) == {"accuracy": 0.75}


def test_accuracy_guaranteed_is_minus_error_times_log_macs():
    # -0.25 * ln 560 = -0.25 * 6.3279
    terms = REWARDS["accuracy_guaranteed"](DENSE, PRUNED, HALF)
    assert terms == {"error_log_size": pytest.approx(-1.58198, abs=1e-5)}


def test_accuracy_guaranteed_takes_params_when_these_are_budgeted():
    budget = Budget(resource="params", limit=100.0, fraction=0.5)
    terms = REWARDS["accuracy_guaranteed"](DENSE, PRUNED, budget)
    assert terms == {"error_log_size": pytest.approx(-0.25 * math.log(80))}


def test_exponential_penalty_over_the_budget():
    # 0.06 over: -1.2 (e^2 - 1) = -7.6669
    terms = REWARDS["exponential_penalty"](DENSE, PRUNED, HALF)
    assert terms["accuracy"] == pytest.approx(-0.25)
    assert terms["budget"] == pytest.approx(-7.66687, abs=1e-4)


@pytest.mark.parametrize(("over", "cost"), [(0.005, 0.22), (0.01, 0.47), (0.03, 2.06), (0.05, 5.15), (0.10, 32.4)])
def test_exponential_penalty_matches_the_scale_of_the_papers_code(over, cost):
    pruned = Measurement(accuracy=1.0, loss=0.0, macs=round(1000 * (0.5 + over)), params=1)
    assert REWARDS["exponential_penalty"](DENSE, pruned, HALF)["budget"] == pytest.approx(-cost, rel=0.02)


@pytest.mark.parametrize("macs", [500, 499, 1])
def test_exponential_penalty_is_nothing_inside_the_budget(macs):
    pruned = Measurement(accuracy=0.5, loss=1.0, macs=macs, params=1)
    assert REWARDS["exponential_penalty"](DENSE, pruned, HALF)["budget"] == 0


def test_an_unknown_reward_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        reward_of("acuracy")
