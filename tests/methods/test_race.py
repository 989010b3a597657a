"""A race among short trainings: who is stopped, and that no stopped plan beats one that went on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baselines.race import LEAST, RACERS, STOPPED, Race
from baselines.search import OPTIMISERS
from prune_env.envs.short_training import ShortTraining
from prune_env.pruning.evaluator import Evaluator, Worth
from prune_env.pruning.measure import Meter
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from prune_env.tasks.datasets import load_splits
from prune_env.tasks.training import TrainSettings
from tests.env.small_networks import build, example

EARLIER = ((0.1, 0.5, 0.9), (0.2,), (0.3, 0.4, 0.5), (0.4, 0.6, 0.7), (0.5, 0.5))


@dataclass(frozen=True, eq=False)
class Told(ShortTraining):
    """Pretends to train: accuracies at the rungs are given."""

    told: tuple[float, ...] = ()

    def raced(self, network: nn.Module, go_on) -> Worth:
        reached = next((at for at in range(1, len(self.told)) if not go_on(self.told[:at])), len(self.told))
        return Worth(self.told[reached - 1], 1.0, self.rungs[reached - 1], self.told[:reached])


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    network = build("residual")
    meter = Meter(example(8), torch.arange(8) % 5)
    return Evaluator(network, trace(network, example()), meter, calibration=example(8))


def told(evaluator: Evaluator, *accuracies: float) -> Evaluator:
    split = load_splits("digits", seed=0).train
    evaluator.judge = Told(split, TrainSettings(), 8, evaluator.meter, told=accuracies)
    return evaluator


def test_a_plan_goes_on_where_it_is_not_below_the_quantile_of_the_earlier_ones() -> None:
    race = Race(EARLIER, 0.5)
    # at the first rung the median is .3
    assert race.goes_on([0.3])
    assert not race.goes_on([0.29])
    # .4, .5, .5, .6 at the second
    assert race.goes_on([0.0, 0.5])
    assert not race.goes_on([0.9, 0.49])
    assert Race(EARLIER, 0.25).goes_on([0.2])
    assert not Race(EARLIER, 0.75).goes_on([0.39])


def test_nobody_is_stopped_before_there_is_somebody_to_lose_against() -> None:
    few = EARLIER[: LEAST - 1]
    assert Race(few, 0.9).goes_on([0.0])
    assert Race(EARLIER[:4], 0.9).goes_on([0.0, 0.0]), "only three of the four reached the second rung"
    assert not Race(EARLIER[:4], 0.9).goes_on([0.0])


def test_a_stopped_plan_costs_less_and_stands_behind_those_that_went_on(evaluator: Evaluator) -> None:
    race = Race(EARLIER, 0.5)
    whole, nothing = race.measure(told(evaluator, 0.5, 0.5, 0.2), Plan({}))
    stopped, less = race.measure(told(evaluator, 0.9, 0.1, 0.2), Plan({}))
    first, least = race.measure(told(evaluator, 0.2, 0.9, 0.9), Plan({}))
    assert (whole.steps, whole.accuracy, nothing) == (8, 0.2, {STOPPED: 0.0})
    assert (stopped.steps, stopped.accuracy, less) == (4, 0.1, {STOPPED: -1.0})
    assert (first.steps, first.rungs, least) == (2, (0.2,), {STOPPED: -2.0})


ACCURACY = st.floats(0, 1)


@given(st.lists(st.tuples(ACCURACY, ACCURACY, ACCURACY), min_size=6, max_size=12), st.floats(0.1, 0.9))
def test_no_plan_beats_one_that_went_further_and_the_race_can_be_told_again(
    evaluator: Evaluator, plans: list[tuple[float, float, float]], worst: float
) -> None:
    def run() -> list[tuple[int, float]]:
        earlier, found = (), []
        for accuracies in plans:
            measured, term = Race(earlier, worst).measure(told(evaluator, *accuracies), Plan({}))
            earlier = (*earlier, measured.rungs)
            found.append((len(measured.rungs), measured.accuracy + term[STOPPED]))
        return found

    found = run()
    assert all(one <= other for far, one in found for further, other in found if further > far)
    assert {reached for reached, _ in found[:LEAST]} == {3}
    assert run() == found


def test_only_what_trains_can_race(evaluator: Evaluator) -> None:
    evaluator.judge = evaluator.instant
    with pytest.raises(ValueError, match="needs the reward 'short-training'"):
        Race((), 0.5).measure(evaluator, Plan({}))


def test_racers_are_searches() -> None:
    assert set(RACERS) < set(OPTIMISERS)
