"""Searches: budgets, exact numbers of evaluations, no plan twice, a state that is only what was told, and success."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import METHODS, allocate
from baselines.allocate import Choices, Counts
from baselines.heuristics import GREEDY, UNIFORM
from baselines.method import Case, case_of, choices_of, plan_of
from baselines.search import KNOWN, OPTIMISERS, Searched, begin, fitted, search_method, standing, worth
from baselines.trials import Search
from prune_env.envs.dynamics import Problem
from prune_env.pruning.measure import Budget, Measurement
from tests.learning.toy import exhausted, toy
from tests.methods.test_allocate import Drawn, chains, levels_of, sums

LOOKING = ("cem", "evolution", "annealing", "netadapt", "bayesian")
QUICK = [pytest.param(name, marks=[pytest.mark.slow] * (name == "bayesian")) for name in OPTIMISERS]
"""Without the one that fits a process before every plan it asks for."""
"""Those that use what they are told."""
TABLE = dict(METHODS)
"""As users find it; inside a test, the searches of `METHODS` are short ones."""


def case(problem: Problem, seed: int = 0) -> Case:
    return case_of(UNIFORM, problem, seed=seed)


def finish(search: Search, value_of, *, until: int | None = None) -> Search:
    """Play the evaluations, all of them or up to a number of trials."""
    while (until is None or len(search.trials) < until) and (counts := search.ask()) is not None:
        search = search.tell(counts, value_of(counts))
    return search


def landscape(problem: Problem):
    """Value of counts on the toy problem."""
    return lambda counts: (float(problem.evaluator.value(counts)), 0.0)


def fresh(choices: Choices, name: str, *, evaluations: int, seed: int = 0) -> Search:
    """A search that knows the uniform plan only, over bare choices."""
    uniform = tuple(allocate.uniform(choices).tolist())
    return Search(choices, OPTIMISERS[name], {"uniform": uniform}, evaluations, seed)


@pytest.mark.parametrize("name", OPTIMISERS)
@settings(max_examples=10, deadline=None)
@given(drawn=chains(groups=4), seed=st.integers(0, 9))
def test_every_plan_is_inside_the_budget_on_its_levels_and_asked_for_once(name: str, drawn: Drawn, seed: int) -> None:
    choices, rng = drawn.choices(), np.random.default_rng(seed)
    search = finish(fresh(choices, name, evaluations=16, seed=seed), lambda counts: (rng.random(), rng.random()))
    plans = [trial.counts for trial in search.trials]
    assert 1 <= len(plans) == len(set(plans)) <= 16
    for plan in plans:
        assert all(count in levels for count, levels in zip(plan, choices.levels, strict=True))
        assert choices.fits(np.array(plan)) or name == "netadapt"  # which comes down to the budget from above
    assert choices.fits(np.array(search.best.counts))
    inside = [trial for trial in search.trials if choices.fits(np.array(trial.counts))]
    assert search.best.value == max(trial.value for trial in inside)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("evaluations", [1, 3, 20])
def test_exactly_so_many_networks_are_measured_and_no_other(name: str, evaluations: int) -> None:
    problem = toy()
    method = search_method(name, evaluations=evaluations)
    assert method.allocate == Searched(name, evaluations)
    counts = method.allocate(case(problem))
    assert problem.evaluator.evaluations == evaluations
    assert choices_of(problem, problem.budget_of(problem.value)).fits(counts)


@pytest.mark.parametrize("name", QUICK)
def test_what_is_asked_next_depends_on_the_trials_alone_and_they_survive_json(name: str) -> None:
    problem = toy()
    first = begin(name, case(problem), evaluations=24)
    whole = finish(first, landscape(problem))
    for number in (0, 2, 9, 23):
        told = json.loads(json.dumps([asdict(trial) for trial in whole.trials[:number]]))
        again = replace(first, trials=())
        for trial in told:
            again = again.tell(np.array(trial["counts"]), tuple(trial["value"]))
        assert finish(again, landscape(problem)).trials == whole.trials


@pytest.mark.parametrize("name", ["random_search", "cem", "evolution", "annealing", "bayesian"])
def test_the_same_seed_asks_the_same_and_another_one_does_not(name: str) -> None:
    problem = toy()
    first = begin(name, case(problem), evaluations=30)
    plans = [finish(replace(first, seed=seed), landscape(problem), until=8).trials for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize("name", ["random_search", "cem", "evolution", "bayesian"])
def test_more_evaluations_go_on_where_fewer_end(name: str) -> None:
    problem = toy()
    first = begin(name, case(problem))
    short, long = (finish(replace(first, evaluations=number), landscape(problem)) for number in (20, 30))
    assert long.trials[:20] == short.trials
    assert long.best.value >= short.best.value


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "cem")) for name in LOOKING])
def test_sixty_evaluations_beat_greedy_and_random_where_the_best_plan_is_known(name: str) -> None:
    """The best of 20,637 plans is worth .533; uniform .458, greedy .449 (41 evaluations), 60 random plans .482.

    Means of six seeds with 60 evaluations: cem .522, evolution .528, annealing .522, netadapt .511, bayesian .533.
    """
    problem = toy()
    greedy = landscape(problem)(GREEDY.allocate(case(problem)))
    best, _ = exhausted(problem)
    first = begin(name, case(problem), evaluations=60)
    found = [finish(replace(first, seed=seed), landscape(problem)).best.value[0] for seed in range(2)]
    assert greedy[0] <= min(found) <= max(found) <= best
    assert np.mean(found) >= 0.5


@pytest.mark.parametrize("name", ["cem", "evolution", "annealing"])
def test_draws_come_closer_to_the_best_as_it_is_learnt(name: str) -> None:
    choices = Choices(levels_of(np.full(6, 40), np.ones(6, dtype=np.int64)), sums, 120.0)
    target = np.array([38, 2, 30, 10, 36, 4])

    def away(counts: Counts) -> float:
        return float(np.abs(counts - target).sum())

    search = finish(fresh(choices, name, evaluations=100), lambda counts: (-away(counts), 0.0))
    distances = [away(np.array(trial.counts)) for trial in search.trials]
    assert np.mean(distances[-20:]) < 0.75 * np.mean(distances[:20])


def test_a_generation_moves_the_distribution_as_worked_by_hand() -> None:
    choices = Choices(levels_of(np.array([8, 8]), np.array([1, 1])), sums, 16.0)
    search = Search(choices, OPTIMISERS["cem"], {"uniform": (2, 8)}, 30).tell(np.array([2, 8]), (0.0, 0.0))
    mean, spread = fitted(search)
    assert mean / np.log(2) == pytest.approx([-2, 0])
    assert spread == pytest.approx([0.35, 0.35])
    elite = [(8, 1), (8, 2), (8, 4), (4, 1), (4, 2), (4, 4)]  # logarithms to base 2: 0 and -1; -3, -2 and -1
    others = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6)]
    for counts in elite + others:
        search = search.tell(np.array(counts), (1.0 if counts in elite else -1.0, 0.0))
    mean, spread = fitted(search)
    assert mean / np.log(2) == pytest.approx([-2 + 0.7 * 1.5, -0.7 * 2])
    assert spread == pytest.approx([0.3 * 0.35 + 0.7 * 0.5 * np.log(2), 0.3 * 0.35 + 0.7 * (2 / 3) ** 0.5 * np.log(2)])


def test_annealing_moves_to_what_is_better_or_equal_and_hardly_ever_to_what_is_much_worse() -> None:
    choices = Choices(levels_of(np.array([9, 9]), np.array([1, 1])), sums, 18.0)
    search = Search(choices, OPTIMISERS["annealing"], {"uniform": (9, 9)}, 20).tell(np.array([9, 9]), (0.5, 0.0))
    stands = []
    for number, reward in enumerate((0.4, 0.6, 0.6, 0.3, 0.59, 0.7)):
        search = search.tell(np.array([1 + number, 1]), (reward, 0.0))
        stands.append(standing(search))
    assert stands == [0, 2, 3, 3, 3, 6]
    accepted = 0
    for seed in range(200):  # a loss of a hundredth of the span, at a temperature of .02 / 10^(1/18) of it
        tried = fresh(choices, "annealing", evaluations=20, seed=seed)
        for counts, reward in (((9, 9), 0.0), ((1, 1), 1.0), ((2, 1), 0.99)):
            tried = tried.tell(np.array(counts), (reward, 0.0))
        accepted += standing(tried) == 2
    assert accepted / 200 == pytest.approx(np.exp(-0.01 / (0.02 * 10 ** (-1 / 18))), abs=0.1)


def test_netadapt_sees_what_greedy_sees_and_ends_where_it_ends() -> None:
    problem, seen = toy(), []

    def value(counts: Counts) -> tuple[float, float]:
        seen.append(tuple(counts.tolist()))
        return landscape(problem)(counts)

    search = finish(begin("netadapt", case(problem), evaluations=60), landscape(problem))
    rounds = (60 - len(search.known) - 1) // 5
    end = allocate.greedy(search.choices, value, rounds=rounds)
    expected = [counts for counts in dict.fromkeys([*seen, tuple(end.tolist())]) if counts not in search.known.values()]
    asked = [trial.counts for trial in search.trials][len(search.known) :]
    assert asked[: len(expected)] == expected


def test_netadapt_without_enough_evaluations_still_brings_its_network_down() -> None:
    problem = toy()
    search = finish(begin("netadapt", case(problem), evaluations=8), landscape(problem))
    assert not search.choices.fits(np.array(search.trials[-2].counts))
    assert search.choices.fits(np.array(search.trials[-1].counts))


def test_the_known_plans_come_first_once_each_and_uniform_first_of_all() -> None:
    problem = toy()
    for name in OPTIMISERS:
        search = begin(name, case(problem))
        assert next(iter(search.known)) == "uniform"
        assert set(search.known) <= {method.name for method in KNOWN}
        assert len(set(search.known.values())) == len(search.known)
        played = finish(search, landscape(problem), until=len(search.known) + 3)
        sources = [played.source(np.array(trial.counts)) for trial in played.trials]
        assert sources == [*search.known, name, name, name]
    assert set(begin("cem", case(problem)).known) > {"uniform", "first_last"}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_there_is_one_plan_only_it_is_measured_once(name: str, share: float) -> None:
    levels = levels_of(np.array([6, 8]), np.array([1, 1]))
    search = finish(fresh(Choices(levels, sums, 2.0 + 12.0 * share), name, evaluations=30), lambda counts: (1.0, 0.0))
    inside = [trial.counts for trial in search.trials if search.choices.fits(np.array(trial.counts))]
    assert inside[0] == search.best.counts == ((1, 1), (6, 8))[int(share)]
    assert len(inside) == 1


def test_a_plan_is_worth_its_reward_at_the_budget_of_the_case_and_then_its_loss() -> None:
    problem = toy()

    def over(dense: Measurement, pruned: Measurement, budget: Budget) -> dict[str, float]:
        return {"accuracy": pruned.accuracy, "over": -(pruned.macs - budget.limit) / budget.limit}

    given = replace(case(replace(problem, reward=over)), choices=choices_of(problem, problem.budget_of(0.25)))
    measured = Measurement(0.75, 0.5, problem.total // 2, 1)
    assert worth(given, measured) == pytest.approx((0.75 - 1.0, -0.5))
    assert worth(case(problem), measured) == (0.75, -0.5)


def test_among_equal_rewards_the_lower_loss_is_best_and_then_the_earlier() -> None:
    choices = Choices(levels_of(np.array([9, 9]), np.array([1, 1])), sums, 9.0)
    search = fresh(choices, "random_search", evaluations=9)
    for counts, loss in (((1, 8), 0.5), ((2, 7), 0.4), ((3, 6), 0.4)):
        search = search.tell(np.array(counts), (0.7, -loss))
    assert search.best.counts == (2, 7)


def test_the_table_holds_every_search_under_its_name_and_the_default_number() -> None:
    for name in OPTIMISERS:
        assert TABLE[name] == search_method(name)
        assert TABLE[name].allocate == Searched(name, 100)
        assert (TABLE[name].name, TABLE[name].paper) == (name, OPTIMISERS[name].paper)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'annealing'"):
        search_method("anealing")
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match=r"evaluations is .*; a whole number of at least 1"):
            search_method("cem", evaluations=wrong)
    problem = toy()
    search = begin("cem", case(problem))
    with pytest.raises(ValueError, match="no plan inside the budget"):
        _ = search.best
    for wrong in ([0, 1, 1, 1, 1], [9, 1, 1, 1, 1], [1, 1]):
        with pytest.raises(ValueError, match="allowed counts of each group"):
            search.tell(np.array(wrong), (0.0, 0.0))
    counts = search.ask()
    assert counts is not None
    with pytest.raises(ValueError, match="measured before"):
        search.tell(counts, (0.0, 0.0)).tell(counts, (0.0, 0.0))


def test_a_plan_of_a_search_is_measured_as_the_env_measures_it() -> None:
    problem = toy()
    given = case(problem)
    found = search_method("cem", evaluations=10).allocate(given)
    best = max(
        (problem.evaluator.measure(plan_of(given, np.array(trial.counts))).accuracy, trial.counts)
        for trial in finish(begin("cem", given, evaluations=10), landscape(problem)).trials
    )
    assert tuple(found.tolist()) == best[1]
