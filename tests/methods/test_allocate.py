"""Laws of the allocators: feasible, exact, nothing wasted, and hand-worked small cases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import allocate
from baselines.allocate import Choices


def levels_of(full: np.ndarray, minimum: np.ndarray, *, round_to: int = 1) -> tuple[np.ndarray, ...]:
    """Counts per group: multiples of `round_to` from the minimum on, and always the two ends."""
    ends = list(zip(minimum.tolist(), full.tolist(), strict=True))
    return tuple(
        np.array(sorted({low, high, *(n for n in range(low, high) if n % round_to == 0)}), dtype=np.int64)
        for low, high in ends
    )


def sums(counts: np.ndarray) -> np.ndarray:
    """The cost of channels that cost 1 each."""
    return np.asarray(counts, dtype=np.float64).sum(-1)


class Chain:
    """Cost of a chain of layers: in * n1 + n1 * n2 + ... + nk * out, each with a weight."""

    def __init__(self, weights: list[int], ends: tuple[int, int]) -> None:
        self.weights, self.ends = np.array(weights, dtype=np.float64), ends

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        counts = np.asarray(counts, dtype=np.float64)
        edge = (*counts.shape[:-1], 1)
        widths = np.concatenate([np.full(edge, self.ends[0]), counts, np.full(edge, self.ends[1])], axis=-1)
        return (widths[..., 1:] * widths[..., :-1]) @ self.weights


@dataclass(frozen=True)
class Drawn:
    """A drawn chain with a budget; the choices are built in the test, since beartype's own draws upset hypothesis."""

    full: list[int]
    minimum: list[int]
    cost: Chain
    round_to: int
    share: float

    def choices(self) -> Choices:
        full, minimum = np.array(self.full, dtype=np.int64), np.array(self.minimum, dtype=np.int64)
        low, high = float(self.cost(minimum)), float(self.cost(full))
        return Choices(levels_of(full, minimum, round_to=self.round_to), self.cost, low + self.share * (high - low))


@st.composite
def chains(draw: st.DrawFn, most: int = 40, groups: int = 5) -> Drawn:
    full = draw(st.lists(st.integers(1, most), min_size=1, max_size=groups))
    weights = draw(st.lists(st.integers(1, 50), min_size=len(full) + 1, max_size=len(full) + 1))
    return Drawn(
        full,
        [draw(st.integers(1, channels)) for channels in full],
        Chain(weights, (draw(st.integers(1, 5)), draw(st.integers(1, 10)))),
        draw(st.sampled_from([1, 1, 2, 4, 8])),
        draw(st.floats(0, 1.1)),
    )


def falling_errors(choices: Choices, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.cumsum(rng.exponential(size=len(levels)))[::-1] - 0.1 for levels in choices.levels]


def every_allocator(choices: Choices, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = [rng.exponential(size=levels[-1]) for levels in choices.levels]
    errors = falling_errors(choices, seed)
    return {
        "uniform": allocate.uniform(choices),
        "random": allocate.random(choices, rng),
        "protected": allocate.protected(choices, (0, len(choices.levels) - 1)),
        "threshold": allocate.threshold(choices, scores),
        "knapsack": allocate.knapsack(choices, errors),
        "greedy": allocate.greedy(choices, lambda counts: -total(choices, errors, counts)),
    }


def total(choices: Choices, errors: list[np.ndarray], counts: np.ndarray) -> float:
    return sum(float(error[rung]) for error, rung in zip(errors, choices.rungs(counts), strict=True))


def raised(choices: Choices, counts: np.ndarray) -> list[np.ndarray]:
    """All counts with one group one level higher."""
    rungs = choices.rungs(counts)
    steps = np.eye(len(rungs), dtype=np.int64)
    below = [rung + 1 < len(levels) for rung, levels in zip(rungs, choices.levels, strict=True)]
    return [choices.at(rungs + step) for step, free in zip(steps, below, strict=True) if free]


@settings(max_examples=30, deadline=None)
@given(drawn=chains(), seed=st.integers(0, 9))
def test_every_allocation_is_inside_the_budget_and_on_its_levels(drawn: Drawn, seed: int) -> None:
    choices = drawn.choices()
    for name, counts in every_allocator(choices, seed).items():
        assert choices.cost(counts) <= choices.limit, name
        for count, levels in zip(counts, choices.levels, strict=True):
            assert count in levels, name


@settings(max_examples=30, deadline=None)
@given(drawn=chains(), seed=st.integers(0, 9))
def test_threshold_knapsack_and_greedy_leave_no_level_that_would_still_fit(drawn: Drawn, seed: int) -> None:
    choices = drawn.choices()
    results = every_allocator(choices, seed)
    for name in ("threshold", "knapsack", "greedy"):
        assert not any(choices.fits(counts) for counts in raised(choices, results[name])), name


@settings(max_examples=30, deadline=None)
@given(drawn=chains(), seed=st.integers(0, 9))
def test_a_budget_at_the_reachable_minimum_gives_the_smallest_network_and_a_full_one_the_whole(
    drawn: Drawn, seed: int
) -> None:
    choices = drawn.choices()
    least = Choices(choices.levels, choices.cost, float(choices.cost(choices.minimum)))
    most = Choices(choices.levels, choices.cost, float(choices.cost(choices.full)))
    for name, counts in every_allocator(least, seed).items():
        np.testing.assert_array_equal(counts, least.minimum, err_msg=name)
    for name, counts in every_allocator(most, seed).items():
        np.testing.assert_array_equal(counts, most.full, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(drawn=chains())
def test_uniform_is_the_largest_common_share_that_fits(drawn: Drawn) -> None:
    choices = drawn.choices()
    counts = allocate.uniform(choices)
    shares = np.unique(
        np.concatenate([(levels[1:] + levels[:-1]) / 2 / levels[-1] for levels in choices.levels] + [[0.0]])
    )
    best = max((share for share in shares if choices.fits(choices.nearest(share))), default=None)
    reference = choices.minimum if best is None else choices.nearest(best)
    rise = choices.rungs(counts) - choices.rungs(reference)
    assert np.all(rise >= 0)
    assert np.all(rise <= 2)  # one for a tie at the next share, one for what is left over


@settings(max_examples=30, deadline=None)
@given(drawn=chains(most=7, groups=3), seed=st.integers(0, 99))
def test_the_knapsack_is_never_worse_than_uniform_and_close_to_the_best_by_exhaustion(drawn: Drawn, seed: int) -> None:
    choices = drawn.choices()
    errors = falling_errors(choices, seed)
    found = total(choices, errors, allocate.knapsack(choices, errors))
    assert found <= total(choices, errors, allocate.uniform(choices)) + 1e-9
    every = (np.array(counts, dtype=np.int64) for counts in itertools.product(*choices.levels))
    best = min(total(choices, errors, counts) for counts in every if choices.fits(counts))
    worst = total(choices, errors, choices.minimum)
    assert found <= best + 0.2 * (worst - best) + 1e-9


def test_the_knapsack_finds_the_exhaustive_optimum_in_nine_of_ten_small_problems() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(50):
        full = rng.integers(4, 9, size=3)
        cost = Chain(rng.integers(1, 30, size=4).tolist(), (3, 10))
        choices = Choices(levels_of(full, np.ones(3, dtype=np.int64)), cost, 0.5 * float(cost(full)))
        errors = [
            (1 - levels / levels[-1]) ** 2 * weight
            for levels, weight in zip(choices.levels, rng.exponential(size=3), strict=True)
        ]
        every = (np.array(counts) for counts in itertools.product(*choices.levels))
        best = min(total(choices, errors, counts) for counts in every if choices.fits(counts))
        hits += total(choices, errors, allocate.knapsack(choices, errors)) <= best + 1e-9
    assert hits >= 45


def test_uniform_by_hand() -> None:
    # cost = 4a + 2b + ... with ends 1, 1 and weights 1, 0, 1 is a + b: two groups of 4 and 8 channels, limit 6
    choices = Choices(levels_of(np.array([4, 8]), np.array([1, 1])), Chain([1, 0, 1], (1, 1)), 6.0)
    np.testing.assert_array_equal(allocate.uniform(choices), [2, 4])


def test_protected_groups_stay_whole_until_the_others_are_at_their_minimum() -> None:
    levels = levels_of(np.array([4, 8, 4]), np.array([1, 1, 1]))
    cost = Chain([1, 0, 0, 1], (1, 1))  # a + c, b is free
    np.testing.assert_array_equal(allocate.protected(Choices(levels, cost, 8.0), (0, 2)), [4, 8, 4])

    np.testing.assert_array_equal(allocate.protected(Choices(levels, sums, 12.0), (0, 2)), [4, 4, 4])
    np.testing.assert_array_equal(allocate.protected(Choices(levels, sums, 5.0), (0, 2)), [2, 1, 2])


def test_a_threshold_compares_scores_after_dividing_by_the_groups_mean() -> None:
    scores = [
        np.array([9.0, 1.0, 1.0, 1.0]),
        np.array([0.4, 0.4, 0.1, 0.1]),
    ]  # over the mean: 3, 1/3.. and 1.6, 1.6, .4, .4
    choices = Choices(levels_of(np.array([4, 4]), np.array([1, 1])), sums, 5.0)
    np.testing.assert_array_equal(allocate.threshold(choices, scores), [1, 4])
    scaled = [scores[0] * 1000, scores[1]]
    np.testing.assert_array_equal(allocate.threshold(choices, scaled), [1, 4])


def test_a_threshold_with_round_to_moves_blocks_by_their_mean_score() -> None:
    levels = levels_of(np.array([8, 8]), np.array([4, 4]), round_to=4)
    choices = Choices(levels, sums, 12.0)
    scores = [np.arange(8.0) + 1, np.full(8, 2.0)]
    np.testing.assert_array_equal(allocate.threshold(choices, scores), [4, 8])


def test_greedy_takes_each_slice_from_the_group_that_hurts_least() -> None:
    choices = Choices(levels_of(np.array([4, 4]), np.array([1, 1])), sums, 5.0)
    seen: list[tuple[int, ...]] = []

    def value(counts: np.ndarray) -> float:
        seen.append(tuple(counts.tolist()))
        return float(10 * counts[0] + counts[1])

    np.testing.assert_array_equal(allocate.greedy(choices, value, rounds=3), [4, 1])
    assert seen == [(3, 4), (4, 3), (3, 3), (4, 2), (3, 2), (4, 1)]


def test_random_plans_of_one_seed_agree_and_of_many_seeds_differ() -> None:
    choices = Choices(
        levels_of(np.array([16, 32, 64]), np.ones(3, dtype=np.int64)), Chain([9, 9, 9, 1], (3, 10)), 9000.0
    )
    draw = [tuple(allocate.random(choices, np.random.default_rng(seed)).tolist()) for seed in (0, 0, 1, 2, 3)]
    assert draw[0] == draw[1]
    assert len(set(draw)) == 4


def test_what_no_choice_can_keep_is_refused_with_the_reachable_minimum() -> None:
    levels = levels_of(np.array([4]), np.array([2]))
    with pytest.raises(ValueError, match="below the reachable minimum of 2"):
        Choices(levels, sums, 1.0)
    choices = Choices(levels, sums, 3.0)
    with pytest.raises(ValueError, match=r"errors\[0\] must be 3 finite numbers"):
        allocate.knapsack(choices, [np.zeros(2)])
    with pytest.raises(ValueError, match=r"scores\[0\] must be finite"):
        allocate.threshold(choices, [np.array([1.0, np.nan, 1.0, 1.0])])
