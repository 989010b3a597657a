"""How well a score ranks plans: tau-b, regret and regressions, by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from benchmarks.lasting.ranking import (
    draws,
    predicted,
    regret,
    regret_estimate,
    ridge,
    spread,
    tau,
    tau_estimate,
)

WHOLE = st.integers(-3, 3)
TRUTH = np.array([0.90, 0.92, 0.91])


def test_tau_counts_pairs_in_order_minus_pairs_out_of_order():
    assert tau(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx((5 - 1) / 6)


def test_tau_b_divides_by_the_pairs_that_are_not_tied():
    assert tau(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(2 / np.sqrt(2 * 3))


def test_a_score_that_says_the_same_of_all_plans_ranks_nothing():
    assert tau(np.ones(4), np.arange(4.0)) == 0


@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=2, max_size=12))
def test_tau_is_that_of_scipy(pairs: list[tuple[int, int]]):
    one, other = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    expected = kendalltau(one, other, variant="b").statistic if len(set(one)) > 1 and len(set(other)) > 1 else 0.0
    assert tau(one, other) == pytest.approx(expected)


def test_a_bootstrap_sample_counts_a_plan_as_often_as_it_was_drawn():
    score, truth = np.array([1.0, 3, 2, 5]), np.array([1.0, 2, 3, 0])
    weights = draws(4, count=50)
    assert (weights.sum(1) == 4).all()
    drawn = [tau(np.repeat(score, row), np.repeat(truth, row)) for row in weights]
    low, high = np.quantile(drawn, [0.025, 0.975])
    estimate = tau_estimate(score, truth, weights)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((tau(score, truth), low, high))


def test_regret_is_what_the_best_of_a_short_list_loses():
    score = np.array([3.0, 1.0, 2.0])
    assert [regret(score, TRUTH, top=top) for top in (1, 2, 3)] == pytest.approx([0.02, 0.01, 0.0])


def test_a_score_gets_no_credit_for_plans_that_it_does_not_tell_apart():
    assert regret(np.zeros(3), TRUTH, top=1) == pytest.approx(0.02)


def test_regret_of_a_sample_is_against_the_best_plan_in_it():
    without_the_best = np.array([[2, 0, 1]])
    estimate = regret_estimate(np.array([3.0, 1.0, 2.0]), TRUTH, without_the_best, top=1)
    assert estimate.value == pytest.approx(0.02)
    assert estimate.low == estimate.high == pytest.approx(0.01)


def test_ridge_by_hand():
    # Standardised, the column is (-1, 1): slope = (x . y) / (x . x + 1) = 2 / 3.
    fit = ridge(np.array([[10.0], [30.0]]), np.array([1.0, 3.0]))
    assert fit(np.array([[20.0], [30.0]])) == pytest.approx(np.array([2.0, 2 + 2 / 3]))


def test_no_plan_is_predicted_from_its_own_truth():
    rng = np.random.default_rng(0)
    columns, truth = rng.normal(size=(12, 2)), rng.normal(size=12)
    for folds in (4, 100):
        before = predicted(columns, truth, folds=folds)
        changed = truth.copy()
        changed[5] += 100
        after = predicted(columns, changed, folds=folds)
        assert after[5] == before[5]
        assert not np.allclose(after, before)


def test_a_linear_truth_is_predicted():
    columns = np.random.default_rng(0).normal(size=(40, 2))
    assert tau(predicted(columns, columns @ [1.0, -2.0]), columns @ [1.0, -2.0]) > 0.95


def test_the_noise_is_the_deviation_of_one_fine_tuning_around_its_plans_mean():
    found = spread({"a": 0.90, "b": 0.92, "c": 0.94}, {"a": 0.91, "c": 0.94})
    assert (found.plans, found.low, found.high, found.pairs) == (3, 0.90, 0.94, 2)
    assert found.deviation == pytest.approx(0.02)
    # Differences .01 and 0: each pair has variance difference^2 / 2.
    assert found.noise == pytest.approx(np.sqrt((0.01**2 / 2 + 0) / 2))
    assert found.ceiling is None, "two pairs say too little"
    alone = spread({"a": 0.90, "b": 0.92}, {})
    assert (alone.noise, alone.ceiling, alone.pairs) == (None, None, 0)


def test_the_ceiling_by_hand():
    first = dict(zip("abcde", (0.90, 0.91, 0.92, 0.93, 0.94), strict=True))
    found = spread(first, {name: value + 0.01 for name, value in first.items()})
    # Variance .01^2 / 2 of 2.5 .01^2 is noise, 4/5 is not: 2/pi asin(sqrt(4/5)).
    assert found.ceiling == pytest.approx(0.7048, abs=5e-5)


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_the_ceiling_is_the_tau_of_what_knows_the_means(noise: float):
    rng = np.random.default_rng(0)
    means = rng.normal(size=2000)
    one, other = ({str(i): value for i, value in enumerate(means + noise * rng.normal(size=2000))} for _ in range(2))
    known = tau(means, np.array(list(one.values())))
    assert spread(one, other).ceiling == pytest.approx(known, abs=0.02)


def test_nothing_but_noise_leaves_no_tau():
    one, same = dict(zip("abcde", (0.90, 0.91, 0.92, 0.93, 0.94), strict=True)), dict.fromkeys("abcde", 0.9)
    assert spread(one, {name: 1.84 - value for name, value in one.items()}).ceiling == 0
    assert spread(same, same).ceiling == 0
