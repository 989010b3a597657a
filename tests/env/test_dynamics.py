"""The decision process: what may be kept, what it costs, and that the budget always holds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_env.envs import dynamics
from prune_env.pruning.plan import Plan
from tests.env.problems import chain, problem_of


@pytest.mark.parametrize(
    ("channels", "min_channels", "round_to", "expected"),
    [
        (5, 1, 1, [1, 2, 3, 4, 5]),
        (10, 1, 4, [4, 8, 10]),
        (8, 1, 4, [4, 8]),
        (8, 5, 4, [8]),
        (12, 5, 4, [8, 12]),
        (3, 1, 8, [3]),
        (6, 4, 1, [4, 5, 6]),
        (4, 9, 1, [4]),
        (1, 1, 1, [1]),
    ],
)
def test_counts_are_multiples_from_the_minimum_on_or_the_whole_group(channels, min_channels, round_to, expected):
    counts = dynamics.allowed_counts(channels, min_channels=min_channels, round_to=round_to)
    assert counts.tolist() == expected


@pytest.mark.parametrize(
    ("channels", "min_keep", "round_to", "expected"),
    [
        (5, 0.2, 1, [1, 2, 3, 4, 5]),
        (5, 0.21, 1, [2, 3, 4, 5]),
        (10, 0.7, 1, [7, 8, 9, 10]),
        (30, 0.1 * 3, 1, list(range(9, 31))),
        (16, 0.2, 8, [8, 16]),
        (20, 0.5, 8, [16, 20]),
        (4, 1.0, 1, [4]),
    ],
)
def test_counts_begin_at_the_least_share(channels, min_keep, round_to, expected):
    assert dynamics.allowed_counts(channels, min_keep=min_keep, round_to=round_to).tolist() == expected


def test_a_worked_example_of_the_outlook():
    # macs = 2 (3 a + a b + 5 b): dense 2 (12 + 24 + 30) = 132, at one channel each 2 (3 + 1 + 5) = 18.
    problem = problem_of(chain([4, 6]), budget=0.5)
    state = dynamics.start(problem)
    assert (problem.total, problem.minimum, state.budget.limit) == (132, 18, 66)
    # with b = 1 the rest costs 2 (3 a + a + 5) = 8 a + 10, so a = 4 gives 42
    ahead = dynamics.outlook(problem, state)
    assert (ahead.spent, ahead.forced, ahead.left, ahead.rest, ahead.price) == (0, 18, 48, 132, 24)
    assert ahead.feasible.tolist() == [1, 2, 3, 4]
    state = dynamics.apply(problem, state, 0.75)
    # a = 3: 2 (9 + 3 b + 5 b) = 18 + 16 b <= 66 up to b = 3
    ahead = dynamics.outlook(problem, state)
    assert state.kept == (3,)
    assert (ahead.spent, ahead.forced, ahead.left, ahead.rest, ahead.price) == (18, 16, 32, 96, 80)
    assert dynamics.feasible(problem, state) == (1, 3)
    state = dynamics.apply(problem, state, 1.0)
    assert state.kept == (3, 3)
    ahead = dynamics.outlook(problem, state)
    assert (ahead.spent, ahead.forced, ahead.left) == (66, 0, 0)
    assert dynamics.finished(problem, state)
    assert dynamics.feasible(problem, state) == (0, 0)


problems = st.builds(
    lambda channels, residual, resource, limits, share: (channels, residual, resource, limits, share),
    st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda sizes: max(sizes) > 5),
    st.booleans(),
    st.sampled_from(["macs", "params"]),
    st.fixed_dictionaries({"min_channels": st.integers(1, 3), "round_to": st.integers(1, 5)}),
    st.floats(0, 1),
)


@given(problems, st.lists(st.floats(-0.5, 1.5), min_size=5, max_size=5))
def test_some_action_is_always_feasible_and_every_episode_ends_inside_its_budget(case, actions):
    channels, residual, resource, limits, share = case
    graph = chain(channels, residual=residual)
    problem = problem_of(graph, budget=1.0, resource=resource, limits=limits)
    # anything from the reachable minimum to the whole
    state = dynamics.start(problem, math.floor(problem.minimum + share * (problem.total - problem.minimum)))
    while not dynamics.finished(problem, state):
        ahead = dynamics.outlook(problem, state)
        assert ahead.spent + ahead.forced + ahead.left == pytest.approx(state.budget.limit)
        # exactly the allowed counts that fit when all later groups are at their minimum
        fitting = []
        for count in problem.allowed[state.position].tolist():
            trial = graph.full.copy()
            trial[list(problem.steps)] = [
                *state.kept, count, *(options[0] for options in problem.allowed[state.position + 1 :])
            ]  # fmt: skip
            if graph.cost[resource](trial) <= state.budget.limit:
                fitting.append(count)
        assert ahead.feasible.tolist() == fitting
        assert fitting
        state = dynamics.apply(problem, state, actions[state.position])
    counts = dynamics.counts(problem, state)
    assert (counts >= 1).all()
    assert graph.cost[resource](counts) <= state.budget.limit


def test_an_action_goes_to_the_nearest_count_and_to_the_smaller_of_two():
    problem = problem_of(chain([8, 8]), budget=1.0, limits={"round_to": 2})
    start = dynamics.start(problem)
    kept = [dynamics.apply(problem, start, share).kept[0] for share in (-3.0, 0.0, 0.3, 0.375, 0.4, 0.99, 7.0)]
    assert kept == [2, 2, 2, 2, 4, 8, 8]


def test_a_state_is_its_own_fork():
    problem = problem_of(chain([4, 6]))
    start = dynamics.start(problem)
    one, other = dynamics.apply(problem, start, 0.25), dynamics.apply(problem, start, 1.0)
    assert (start.kept, one.kept, other.kept) == ((), (1,), (4,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        start.kept = (1,)


def test_a_full_budget_lets_everything_stay_and_the_plan_is_full():
    problem = problem_of(chain([4, 6, 3]), budget=1)
    state = dynamics.start(problem)
    for _ in problem.steps:
        state = dynamics.apply(problem, state, 1.0)
    assert dynamics.plan(problem, state) == Plan.full(problem.graph)


def test_kept_channels_are_those_of_highest_score_and_open_groups_are_whole():
    problem = problem_of(chain([4, 6]), budget=1.0)
    state = dynamics.apply(problem, dynamics.start(problem), 0.5)
    plan = dynamics.plan(problem, state)
    assert plan.keep["conv0"] == tuple(sorted(np.argsort(-problem.scores["conv0"])[:2].tolist()))
    assert len(plan.keep["conv1"]) == 6


def test_groups_left_alone_are_no_steps_and_stay_whole():
    problem = problem_of(chain([4, 6, 3]), budget=0.6, limits={"leave": ("conv1",)})
    assert problem.steps == (0, 2)
    state = dynamics.start(problem)
    for _ in problem.steps:
        state = dynamics.apply(problem, state, 0.0)
    assert dynamics.counts(problem, state).tolist() == [1, 6, 1]


def test_a_misspelt_group_to_leave_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match="conv1"):
        dynamics.open_steps(chain([4, 6]), leave=("cnv1",))


def test_leaving_every_group_is_refused():
    with pytest.raises(ValueError, match="no group to decide"):
        problem_of(chain([4, 6]), limits={"leave": ("conv0", "conv1")})


@pytest.mark.parametrize("value", [0.1, 17])
def test_a_budget_below_the_reachable_minimum_is_refused_with_the_minimum(value):
    with pytest.raises(ValueError, match="18"):
        problem_of(chain([4, 6]), budget=value)


def test_the_reachable_minimum_itself_is_a_budget():
    problem = problem_of(chain([4, 6]), budget=18)
    assert dynamics.start(problem, 18 / 132).budget.limit == pytest.approx(18)
    state = dynamics.apply(problem, dynamics.apply(problem, dynamics.start(problem), 1.0), 1.0)
    assert state.kept == (1, 1)


@pytest.mark.parametrize("share", [float("nan"), float("inf")])
def test_a_share_that_is_no_number_is_refused(share):
    problem = problem_of(chain([4, 6]))
    with pytest.raises(ValueError, match="finite"):
        dynamics.apply(problem, dynamics.start(problem), share)


def test_deciding_after_the_end_is_refused():
    problem = problem_of(chain([4]), budget=1.0)
    state = dynamics.apply(problem, dynamics.start(problem), 1.0)
    with pytest.raises(ValueError, match="new episode"):
        dynamics.apply(problem, state, 1.0)


def test_a_soft_budget_leaves_the_action_alone():
    problem = problem_of(chain([4, 6]), budget=0.5, hard=False)
    state = dynamics.start(problem)
    for _ in problem.steps:
        state = dynamics.apply(problem, state, 1.0)
    assert state.kept == (4, 6)
    assert dynamics.outlook(problem, state).left < 0
