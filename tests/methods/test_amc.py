"""AMC's formulas by hand: noise, baseline, rounding and bounds over three layers, the state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baselines import amc
from prune_env.config import EnvConfig, problem_from
from prune_env.envs import dynamics
from prune_env.envs.dynamics import Problem
from tests.env.problems import chain, problem_of


def walked(problem: Problem, ratios: list[float]) -> tuple[int, ...]:
    """Channels kept when the actor says these ratios; groups with one allowed count are no steps."""
    state = dynamics.start(problem)
    for ratio in ratios[: len(problem.steps)]:
        at = state.position
        state = dynamics.apply(problem, state, amc.rounded_up(problem.allowed[at], problem.channels[at], ratio))
    return state.kept


def test_the_noise_starts_at_a_half_and_falls_by_a_twentieth_after_each_episode() -> None:
    # .5 * .95^0, .5 * .95, .5 * .95^10
    assert [amc.PAPER.width(episode) for episode in (0, 1, 10)] == pytest.approx([0.5, 0.475, 0.299368], abs=1e-6)


def test_a_truncated_normal_has_the_mean_that_its_bounds_give_it() -> None:
    rng = np.random.default_rng(0)
    draws = [amc.truncated_normal(rng, 0.0, 0.5) for _ in range(20_000)]
    assert 0 <= min(draws) <= max(draws) <= 1
    # sigma (phi(0) - phi(2)) / (Phi(2) - Phi(0)) = .5 (.398942 - .053991) / .477250
    assert np.mean(draws) == pytest.approx(0.361394, abs=0.005)


def test_without_noise_the_mean_is_moved_inside() -> None:
    rng = np.random.default_rng(0)
    assert [amc.truncated_normal(rng, mean, 0.0) for mean in (-0.2, 0.3, 1.7)] == [0.0, 0.3, 1.0]


def test_the_baseline_begins_at_the_first_batchs_mean_and_moves_half_way_to_the_next() -> None:
    first = amc.moved_baseline(math.nan, np.array([1.0, 3.0]), rate=0.5)
    assert first == 2.0
    assert amc.moved_baseline(first, np.array([4.0, 6.0]), rate=0.5) == 3.5


@pytest.mark.parametrize(
    ("ratio", "expected"),
    # rounded to 0 (not kept: the least is 3), 3, 8, 9, 10, 12 of 12
    [(0.0, 4), (0.25, 4), (0.67, 8), (0.75, 12), (0.83, 12), (1.0, 12)],
)
def test_a_ratio_is_rounded_and_then_goes_up_to_an_allowed_count(ratio: float, expected: int) -> None:
    allowed = dynamics.allowed_counts(12, min_keep=0.2, round_to=4)
    assert allowed.tolist() == [4, 8, 12]
    assert amc.rounded_up(allowed, 12, ratio) * 12 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [
        # With the later layers at 2 channels: 2 (3 a + 2 a + 4 + 10) = 28 + 10 a <= 112 up to a = 8 (the paper's ratio:
        # .84); then 2 (24 + 8 b + 2 b + 10) = 68 + 20 b up to b = 2 (.22); then 80 + 14 c up to c = 2 (.228).
        ([1.0, 1.0, 1.0], (8, 2, 2)),
        # a = 6: 56 + 16 b up to b = 3 (.35); 72 + 16 c up to c = 2 (.25).
        ([0.6, 1.0, 1.0], (6, 3, 2)),
        # Below .2 no layer goes: 2 (6 + 4 + 2 c + 5 c) = 20 + 14 c up to c = 6.
        ([0.0, 0.1, 0.9], (2, 2, 6)),
    ],
)
def test_the_bounds_leave_all_later_layers_their_minimum(ratios: list[float], kept: tuple[int, ...]) -> None:
    # macs = 2 (3 a + a b + b c + 5 c), 560 when whole
    problem = problem_of(chain([10, 10, 10]), budget=0.2, limits={"min_keep": 0.2})
    assert walked(problem, ratios) == kept


def test_rounding_up_never_goes_over_the_budget() -> None:
    # a = 8, b = 8; 176 + 26 c <= 300 gives a ratio of .477: rounded to 5 and up to 8 that would be 384, so c = 4
    problem = problem_of(chain([10, 10, 10]), budget=300, limits={"min_keep": 0.2, "round_to": 4})
    assert walked(problem, [0.5, 1.0, 1.0]) == (8, 8, 4)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.1, 1), st.integers(1, 8))
def test_whatever_the_actor_says_the_budget_holds(ratios: list[float], budget: float, round_to: int) -> None:
    graph = chain([16, 7, 24, 9], residual=True)
    limits = {"min_keep": 0.2, "round_to": round_to}
    probe = problem_of(graph, budget=1.0, limits=limits)
    problem = problem_of(graph, budget=max(budget, probe.minimum / probe.total + 1e-9), limits=limits)
    kept = walked(problem, ratios)
    counts = graph.full.copy()
    counts[list(problem.steps)] = kept
    assert graph.cost["macs"](counts) <= problem.budget_of(problem.value).limit
    assert all(count >= 0.2 * whole for count, whole in zip(kept, problem.channels, strict=True))


def test_the_state_by_hand() -> None:
    # Readers 4 -> 6, 6 -> 8, 8 -> 5 at two positions: 48, 96, 80 macs behind the first layer's 24.
    problem = problem_of(chain([4, 6, 8]), budget=0.9)
    known = amc.known_features(problem)
    state = dynamics.start(problem)
    seen = dict(zip(amc.FEATURES, amc.state_of(problem, known, state).tolist(), strict=True))
    same = {"h": 0, "w": 0, "stride": 0, "k": 0}
    expected = {"t": 0, "n": 1 / 3, "c": 0, "flops": 0, "reduced": 0, "rest": 176 / 248, "previous": 1}
    assert seen == pytest.approx(expected | same)
    state = dynamics.apply(problem, state, 0.5)
    seen = dict(zip(amc.FEATURES, amc.state_of(problem, known, state).tolist(), strict=True))
    # 2 of 4 channels: 12 of the first layer's 24 macs are gone, and 24 of the second's 48
    expected = {"t": 0.5, "n": 1, "c": 0.5, "flops": 1, "reduced": 36 / 248, "rest": 80 / 248, "previous": 0.5}
    assert seen == pytest.approx(expected | same)


def test_the_state_describes_the_layer_that_reads_a_group() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    draw = torch.Generator().manual_seed(0)
    split = torch.randn(8, 1, 8, 8, generator=draw), torch.randint(5, (8,), generator=draw)
    problem = problem_from(network, calibration=split, search=split)
    readers = [amc.reader(problem.graph, group) for group in problem.graph.groups]
    assert [layer.name for layer in readers] == ["2", "5"]
    known = amc.known_features(problem)
    # Convolution 4 -> 6, map of side 8, stride 2, kernel 3, 3,456 macs; linear 96 -> 5, side 1, no stride, 480 macs.
    assert known[0].tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 0, pytest.approx(480 / (576 * 4 + 3456 + 480)), 0]
    assert known[1].tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_every_state_is_in_the_unit_cube(actions: list[float]) -> None:
    problem = problem_of(chain([4, 7, 5], residual=True), budget=0.5)
    known, state = amc.known_features(problem), dynamics.start(problem)
    for action in [*actions, None]:
        seen = amc.state_of(problem, known, state)
        assert seen.shape == (len(amc.FEATURES),)
        assert ((seen >= 0) & (seen <= 1)).all()
        state = state if action is None else dynamics.apply(problem, state, action)


@pytest.mark.parametrize("preset", [amc.PAPER, amc.SMALL])
def test_a_presets_options_are_those_of_the_environment(preset: amc.Preset) -> None:
    mine = {name: value for name, value in preset.options.items() if name not in ("episodes", "warm_up")}
    config = EnvConfig.of("digits-cnn", **mine)
    assert {name: getattr(config, name) for name in mine} == mine
