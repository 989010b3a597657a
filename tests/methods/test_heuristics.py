"""What each heuristic is for, on a problem whose evaluator counts how often it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from baselines import METHODS, Method
from baselines.allocate import Counts
from baselines.heuristics import GREEDY_ROUNDS, errors_of
from baselines.method import case_of
from baselines.search import OPTIMISERS
from prune_env.config import make_problem
from prune_env.envs.dynamics import Problem
from tests.methods.own_tasks import own_task


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(own_task("residual"), budget=0.5, recalibrate=False, refit="none", calibration_images=96)


def counts_of(method: Method, problem: Problem, *, budget: float = 0.5, seed: int = 0) -> Counts:
    return method.allocate(case_of(method, problem, budget=budget, seed=seed))


def test_only_greedy_evaluates_and_not_more_than_it_says(problem: Problem) -> None:
    for name, method in METHODS.items():
        problem.evaluator._measured.clear()  # a plan that another one measured before costs nothing
        before = problem.evaluator.evaluations
        counts_of(method, problem)
        asked = problem.evaluator.evaluations - before
        if name in OPTIMISERS:
            assert 0 < asked <= 8
            continue
        assert (0 < asked <= (GREEDY_ROUNDS + 1) * len(problem.steps)) if name == "greedy" else asked == 0


def test_uniform_keeps_nearly_the_same_share_everywhere(problem: Problem) -> None:
    channels = np.array(problem.channels)
    shares = counts_of(METHODS["uniform"], problem) / channels
    assert np.ptp(shares) <= 2 / channels.min()


def test_first_and_last_group_stay_whole(problem: Problem) -> None:
    counts = counts_of(METHODS["first_last"], problem, budget=0.8)
    assert (counts[0], counts[-1]) == (problem.channels[0], problem.channels[-1])


def test_global_magnitude_does_not_see_the_scale_of_a_group(problem: Problem) -> None:
    method = METHODS["global_magnitude"]
    case = case_of(method, problem)
    first = problem.graph.groups[problem.steps[0]].name
    scaled = Method("scaled", "", importance=lambda case: {**case.scores, first: 100 * case.scores[first]})
    np.testing.assert_array_equal(method.allocate(case), method.allocate(case_of(scaled, problem)))


def test_lamp_is_one_ranking_of_its_own_scores_as_they_are(problem: Problem) -> None:
    method = METHODS["lamp"]
    case = case_of(method, problem)
    assert all(scores.max() == 1 for scores in case.scores.values())
    counts = method.allocate(case)
    names = [problem.graph.groups[step].name for step in problem.steps]
    kept = [np.sort(case.scores[name])[::-1][:count] for name, count in zip(names, counts, strict=True)]
    lost = [np.sort(case.scores[name])[::-1][count:] for name, count in zip(names, counts, strict=True)]
    # But for what filled up the budget, no channel goes that scores higher than one that stays in another group.
    assert sum(high > low for one in lost for high in one for other in kept for low in other) <= 2
    scaled = Method("scaled", "", importance=lambda _: {**case.scores, names[0]: 100 * case.scores[names[0]]})
    assert method.allocate(case_of(scaled, problem))[0] > counts[0]


def test_error_curves_sum_to_no_more_error_than_uniform_or_any_other(problem: Problem) -> None:
    case = case_of(METHODS["error_curves"], problem)
    curves = errors_of(case)

    def error(counts: Counts) -> float:
        return sum(float(curve[rung]) for curve, rung in zip(curves, case.choices.rungs(counts), strict=True))

    for budget in (0.3, 0.5, 0.8):
        free = error(counts_of(METHODS["error_curves"], problem, budget=budget))
        for method in METHODS.values():
            assert free <= error(counts_of(method, problem, budget=budget)) + 1e-9


def test_random_spends_its_budget(problem: Problem) -> None:
    budget = 0.5 * problem.total
    spent = []
    for seed in range(20):
        counts = problem.graph.full.copy()
        counts[list(problem.steps)] = counts_of(METHODS["random"], problem, seed=seed)
        spent.append(float(problem.graph.cost["macs"](counts)) / budget)
    assert max(spent) <= 1
    assert np.mean(spent) >= 0.85
