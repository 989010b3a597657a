"""What the agent sees: bounded, fresh, and right to the number on a worked example."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_env.envs import dynamics, observation
from prune_env.envs.dynamics import Problem, State
from prune_env.envs.observation import CHANGING, KNOWN, LAYER
from tests.env.problems import chain, problem_of


def look(problem: Problem, state: State) -> dict[str, np.ndarray]:
    return observation.observe(problem, state, dynamics.outlook(problem, state))


def test_a_worked_example():
    problem = problem_of(chain([4, 6]), budget=0.5)
    seen = look(problem, dynamics.apply(problem, dynamics.start(problem), 0.75))
    assert set(seen) == {*CHANGING, *KNOWN}
    expected = {
        "position": [1 / 2],
        "budget": [66 / 132],
        "spent": [18 / 132],
        "forced": [16 / 132],
        "left": [32 / 132],
        "rest": [96 / 132],
        "price": [80 / 132],
        "feasible": [1 / 6, 3 / 6],
        "previous_keep": [3 / 4],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-6, err_msg=name)


def test_a_worked_layer_description():
    problem = problem_of(chain([4, 6]), budget=0.5)
    layer = dict(zip(LAYER, look(problem, dynamics.start(problem))["layer"].tolist(), strict=True))
    assert layer["convolution"] == 1
    assert layer["channels"] == pytest.approx(2 / 12)
    assert layer["inputs"] == pytest.approx(np.log2(3) / 12)
    assert layer["kernel"] == pytest.approx(1 / 7)
    # without the first group 5 * 6 of 66 parameters remain
    assert layer["params"] == pytest.approx(36 / 66)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0.3, 1), st.booleans())
def test_every_observation_is_in_the_space(actions, budget, hard):
    problem = problem_of(chain([4, 7, 5], residual=True), budget=budget, hard=hard)
    state, space = dynamics.start(problem), observation.space()
    assert look(problem, state) in space
    for action in actions:
        state = dynamics.apply(problem, state, action)
        assert look(problem, state) in space


def test_spent_forced_and_left_make_up_the_budget():
    problem = problem_of(chain([4, 7, 5]), budget=0.6, resource="params")
    state = dynamics.start(problem)
    for _ in problem.steps:
        seen = look(problem, state)
        assert seen["spent"] + seen["forced"] + seen["left"] == pytest.approx(seen["budget"], rel=1e-5)
        state = dynamics.apply(problem, state, 0.5)


def test_the_end_of_an_episode_shows_no_group():
    problem = problem_of(chain([4]), budget=1.0)
    seen = look(problem, dynamics.apply(problem, dynamics.start(problem), 0.5))
    assert seen["position"] == 1
    for name in ("layer", "static_importance", "error_curve", "feasible", "price", "forced", "rest"):
        assert not seen[name].any(), name


def test_an_observation_shares_no_memory_with_another_or_with_the_problem():
    problem = problem_of(chain([4, 6]))
    state = dynamics.start(problem)
    one, other = look(problem, state), look(problem, state)
    for name in one:
        assert not np.shares_memory(one[name], other[name])
        if name in problem.fields:
            assert not np.shares_memory(one[name], problem.fields[name])
    before = {name: value.copy() for name, value in other.items()}
    for value in one.values():
        value.fill(0.123)
    for name, value in look(problem, state).items():
        np.testing.assert_array_equal(value, before[name])


def test_the_space_is_the_same_for_every_network():
    assert observation.space() == observation.space()
    shapes = [
        {name: value.shape for name, value in look(p, dynamics.start(p)).items()}
        for p in (problem_of(chain([4])), problem_of(chain([4, 9, 30]), resource="params"))
    ]
    assert shapes[0] == shapes[1]


def test_quantiles_of_a_ramp_are_the_ramp():
    np.testing.assert_allclose(observation.quantiles(np.arange(21.0), 11), np.arange(0, 21, 2))


@pytest.mark.parametrize("score", [[-2.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
def test_importance_of_any_sign_and_scale_is_shown_in_bounds(score):
    graph = chain([4])
    table = observation.describe(
        graph,
        (0,),
        scores={"conv0": np.array(score)},
        activations={"conv0": np.zeros((3, 4))},
        curves={"conv0": np.linspace(1, 0, 9)},
    )
    for name, rows in table.items():
        assert rows.shape == (2, KNOWN[name])
        assert rows.dtype == np.float32
        assert ((rows >= 0) & (rows <= 1)).all(), name
