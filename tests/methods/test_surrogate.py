"""The surrogate: what it says where plans were measured and where none was, and which plan it picks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import allocate, surrogate
from baselines.allocate import Choices
from baselines.surrogate import Surrogate, promising
from tests.methods.test_allocate import Drawn, chains, levels_of, sums

CHOICES = Choices(levels_of(np.array([16, 16, 16]), np.array([1, 1, 1])), sums, 24.0)
MEASURED = np.array([[8, 8, 8], [4, 8, 12], [12, 8, 4], [10, 10, 4], [6, 9, 9]]) / 16
VALUES = np.array([0.70, 0.60, 0.75, 0.72, 0.66])


def test_where_a_plan_was_measured_it_is_known_and_far_away_nothing_is() -> None:
    known = Surrogate(MEASURED, VALUES)
    mean, deviation = known.predicted(MEASURED)
    assert mean == pytest.approx(VALUES, abs=0.01)
    assert deviation.max() < 0.3 * VALUES.std()
    mean, deviation = known.predicted(np.full((1, 3), 1e-12))
    assert mean == pytest.approx([VALUES.mean()], abs=1e-6)
    assert deviation == pytest.approx([VALUES.std()], rel=0.01)


def test_of_a_smooth_landscape_it_knows_what_lies_between() -> None:
    rng = np.random.default_rng(0)
    shares, asked = rng.uniform(0.2, 1.0, (60, 3)), rng.uniform(0.3, 0.9, (40, 3))

    def value(some: np.ndarray) -> np.ndarray:
        return np.exp(-((some - np.array([0.4, 0.8, 0.6])) ** 2).sum(1))

    mean, deviation = Surrogate(shares, value(shares)).predicted(asked)
    assert np.abs(mean - value(asked)).max() < 0.05
    assert np.mean(np.abs(mean - value(asked)) < 2 * deviation) >= 0.9


def test_the_expected_improvement_as_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With z = (mean - best) / s it is s (z Phi(z) + phi(z)); phi(0) = .3989423, phi(-2) = .0539910."""
    known = Surrogate(MEASURED, VALUES)
    told = np.array([0.75, 1.75, -1.25, 0.5]), np.array([2.0, 0.0, 1.0, 0.0])
    monkeypatch.setattr(Surrogate, "predicted", lambda self, shares: told)
    assert known.improvement(np.ones((4, 3))) == pytest.approx([0.7978846, 1.0, 0.0084907, 0.0], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_values_give_improvements_that_are_numbers_and_not_below_zero(values: list[float], seed: int) -> None:
    asked = np.random.default_rng(seed).uniform(0.05, 1.0, (6, 3))
    found = Surrogate(MEASURED[: len(values)], np.array(values)).improvement(asked)
    assert np.isfinite(found).all()
    assert found.min() >= -1e-9


def test_it_picks_the_new_plan_with_the_largest_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def improvement(self: Surrogate, shares: np.ndarray) -> np.ndarray:
        seen.append(shares)
        return shares[:, 2]

    monkeypatch.setattr(Surrogate, "improvement", improvement)
    taken = {tuple(row) for row in np.rint(16 * MEASURED).astype(int).tolist()}
    found = promising(CHOICES, MEASURED, VALUES, taken, np.random.default_rng(0))
    drawn = np.rint(16 * seen[0]).astype(int)
    assert found[2] >= drawn[:, 2].max()  # brought to the budget, it may gain a channel
    assert CHOICES.fits(found)
    assert tuple(found.tolist()) not in taken
    assert not {tuple(row) for row in drawn.tolist()} & taken
    assert len(drawn) > 100


def test_candidates_are_neighbours_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(Surrogate, "improvement", lambda self, shares: seen.append(shares) or shares[:, 0])
    for reach, values in ((0.02, VALUES), (0.02, -VALUES), (0.5, VALUES)):
        monkeypatch.setattr(surrogate, "REACH", reach)
        promising(CHOICES, MEASURED, values, set(), np.random.default_rng(0))
    away = [np.abs(shares[:, None] - MEASURED).max(2) for shares in seen]
    assert np.bincount(away[0].argmin(1), minlength=5).argmax() == 2  # the best
    assert np.bincount(away[1].argmin(1), minlength=5).argmax() == 1  # the best, with its worth turned round
    assert away[0].min(1).mean() < 0.05 < 0.1 < away[2].min(1).mean()


@settings(max_examples=25, deadline=None)
@given(drawn=chains(groups=4), seed=st.integers(0, 99))
def test_guesses_cost_what_plans_of_these_shares_cost(drawn: Drawn, seed: int) -> None:
    choices = drawn.choices()
    shares = np.random.default_rng(seed).uniform(0.02, 1.0, (8, len(choices.levels)))
    for guess, share in zip(surrogate._spending(choices, shares), shares, strict=True):
        exact = allocate.scaled(choices, share)
        assert choices.fits(guess) or (guess == choices.minimum).all()
        step = max(np.diff(levels).max(initial=1) for levels in choices.levels)
        assert np.abs(guess - exact).max() <= 2 * step


def test_where_nothing_is_new_it_hands_back_what_is_known() -> None:
    whole = Choices(CHOICES.levels, sums, 48.0)
    found = promising(whole, np.ones((1, 3)), np.ones(1), {(16, 16, 16)}, np.random.default_rng(0))
    assert found.tolist() == [16, 16, 16]
