"""The drawn plan says what the state says."""

from __future__ import annotations

import numpy as np
import pytest

from prune_env.envs import dynamics, render
from prune_env.pruning.measure import Measurement
from tests.env.problems import chain, problem_of


def test_text_names_every_group_with_what_became_of_it():
    problem = problem_of(chain([4, 6, 8, 3]), budget=0.5, limits={"leave": ("conv3",)})
    state = dynamics.apply(problem, dynamics.start(problem), 0.5)
    lines = render.draw_text(problem, state).splitlines()
    assert "step 1 of 3" in lines[0]
    assert "macs budget 0.500" in lines[0]
    assert "2 of 4" in lines[1]
    assert lines[1].count("█") == render.COLUMNS // 2
    assert "next" in lines[2]
    assert "open" in lines[3]
    assert "left whole" in lines[4]
    assert all(word in lines[5] for word in ("spent", "forced", "left", "budget"))


def test_a_finished_plan_shows_its_accuracy():
    problem = problem_of(chain([4]), budget=1.0)
    state = dynamics.apply(problem, dynamics.start(problem), 0.5)
    text = render.draw_text(problem, state, Measurement(0.8125, 0.5, 1, 1))
    assert "accuracy 0.8125 (dense 0.9000)" in text


@pytest.mark.parametrize("groups", [1, 4, 27, 120])
def test_the_picture_shows_kept_and_gone_in_proportion(groups):
    problem = problem_of(chain([8] * groups), budget=1.0)
    state = dynamics.start(problem)
    for _ in problem.steps:
        state = dynamics.apply(problem, state, 0.5)
    picture = render.draw_picture(problem, state)
    assert picture.dtype == np.uint8
    assert picture.shape == (render.HEIGHT, render.WIDTH, 3)
    bars = picture[render.TOP + 20 : render.BASE - 1]
    kept, gone = ((bars == colour).all(-1).sum() for colour in (render.KEPT, render.GONE))
    assert kept / (kept + gone) == pytest.approx(0.5, abs=0.06)


def test_a_picture_is_a_new_array_each_time():
    problem = problem_of(chain([4, 6]))
    one, other = (render.draw_picture(problem, dynamics.start(problem)) for _ in range(2))
    assert not np.shares_memory(one, other)
    one.fill(0)
    np.testing.assert_array_equal(render.draw_picture(problem, dynamics.start(problem)), other)
