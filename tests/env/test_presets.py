"""Reward presets: a short training and a predictor as measures of an episode, exact, repeatable and without traces."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

from prune_env.config import EnvConfig, make_problem, make_task, problem_from
from prune_env.envs import short_training
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem
from prune_env.envs.predictor import FEATURES, Predictor
from prune_env.envs.short_training import ShortTraining
from prune_env.envs.widths import widths
from prune_env.presets import MEASURES, PRESETS, Bench
from prune_env.pruning.plan import Plan
from prune_env.tasks.dense import recipe
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainingDiverged, TrainSettings, train_steps
from tests import contracts
from tests.env.small_networks import build, example

SHORT = {"reward": "short-training", "short_steps": 4, "short_lr": 0.05, "calibration_images": 64}


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task("digits-cnn", epochs=1, search_size=200)


@pytest.fixture(scope="module")
def problem(task: Task) -> Problem:
    return make_problem(task, **SHORT)


def half(problem: Problem) -> Plan:
    counts = np.maximum(problem.graph.full // 2, 1)
    return Plan.of_counts(problem.graph, counts, problem.scores)


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


# Short training


def test_a_short_training_is_the_realised_network_after_its_steps(task: Task, problem: Problem) -> None:
    network = problem.evaluator.realise(half(problem)).requires_grad_(True)
    at_once = problem.evaluator.meter.accuracy_and_loss(network)
    train_steps(network, task.train, steps=4, settings=recipe("digits", "cnn", seed=0, lr=0.05))
    measured = problem.evaluator.measure(half(problem))
    assert (measured.accuracy, measured.loss) == problem.evaluator.meter.accuracy_and_loss(network) != at_once
    assert (measured.steps, measured.rungs) == (4, ())
    assert measured.macs == problem.graph.macs(half(problem))


def test_a_short_training_repeats_itself_whatever_came_before_and_leaves_no_trace(task: Task, problem: Problem) -> None:
    dense = problem.evaluator.network
    before, drawn = state_of(dense), torch.get_rng_state()
    given = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    other = make_problem(task, **SHORT)
    other.evaluator.measure(Plan.of_counts(other.graph, other.graph.full // 4, other.scores))
    torch.manual_seed(5)
    first = other.evaluator.measure(half(other))
    torch.set_rng_state(drawn)
    assert problem.evaluator.judged(half(problem), problem.evaluator.judge) == first
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in dense.named_parameters()} == given
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert not dense.training


def test_a_training_that_diverges_is_worth_a_guess(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(network: nn.Module, *arguments: object, **options: object) -> None:
        raise TrainingDiverged("loss is nan")

    monkeypatch.setattr(short_training, "train_steps", diverge)
    measured = problem.evaluator.judged(half(problem), problem.evaluator.judge)
    assert (measured.accuracy, measured.loss, measured.steps) == (0.1, math.log(10), 4)


def test_a_rate_at_which_weights_explode_is_worth_a_guess(task: Task) -> None:
    problem = make_problem(task, **{**SHORT, "short_lr": 1e30})
    assert problem.evaluator.measure(half(problem)).accuracy == 0.1


def test_a_watched_training_is_worth_what_an_unwatched_one_is(problem: Problem) -> None:
    judge = problem.evaluator.judge
    asked: list[int] = []

    def go_on(rungs: list[float]) -> bool:
        asked.append(len(rungs))
        return True

    watched = problem.evaluator.judged(half(problem), lambda network, plan: judge.raced(network, go_on))
    assert judge.rungs == (1, 2, 4)
    assert asked == [1, 2]
    assert replace(watched, rungs=()) == problem.evaluator.measure(half(problem))
    assert len(watched.rungs) == 3
    assert watched.rungs[-1] == watched.accuracy


def test_a_training_that_is_not_to_go_on_ends_there(problem: Problem) -> None:
    judge, plan = problem.evaluator.judge, half(problem)
    networks = []

    def raced(network: nn.Module, plan: Plan):
        networks.append(network)
        return judge.raced(network, lambda rungs: len(rungs) < 2)

    whole = problem.evaluator.judged(plan, lambda network, plan: judge.raced(network, lambda rungs: True))
    left = problem.evaluator.judged(plan, raced)
    assert (left.steps, left.rungs, left.accuracy) == (2, whole.rungs[:2], whole.rungs[1])
    assert problem.evaluator.meter.accuracy_and_loss(networks[0])[1] == pytest.approx(left.loss, rel=1e-5)


@pytest.mark.parametrize(("steps", "rungs"), [(1, (1,)), (2, (1, 2)), (60, (15, 30, 60)), (7, (1, 3, 7))])
def test_rungs_are_a_quarter_a_half_and_all(problem: Problem, steps: int, rungs: tuple[int, ...]) -> None:
    assert replace(problem.evaluator.judge, steps=steps).rungs == rungs


def test_an_episode_is_paid_what_its_network_is_worth_after_the_training(problem: Problem) -> None:
    env = ChannelPruningEnv(problem)
    env.reset(seed=0)
    over = False
    while not over:
        _, reward, over, _, info = env.step(np.array([0.5], dtype=np.float32))
    measured = problem.evaluator.measure(Plan.from_json(info["plan"]))
    assert reward == measured.accuracy == info["accuracy"] == info["reward/accuracy"]
    assert info["steps"] == 4


def test_the_environment_stays_a_pure_function_of_its_actions(task: Task) -> None:
    options = {"task": "digits-cnn", "epochs": 0, "search_size": 50, **SHORT, "short_steps": 2}
    env = gymnasium.make("prune_env:prune_env/ChannelPruning-v0", **options).unwrapped
    check_env(env, skip_render_check=True)
    twin = ChannelPruningEnv(make_problem(make_task("digits-cnn", epochs=0, search_size=50), **SHORT))
    contracts.twins_agree(twin, ChannelPruningEnv(copy.copy(twin.problem)), episodes=1)


# Presets


def test_every_measure_has_a_preset_and_every_preset_a_measure() -> None:
    assert {preset.measure for preset in PRESETS.values()} == set(MEASURES)


def test_instant_is_what_accuracy_always_was(task: Task) -> None:
    old, new = (make_problem(task, reward=name, calibration_images=64) for name in ("accuracy", "instant"))
    assert old.evaluator.measure(half(old)) == new.evaluator.measure(half(new))
    network = old.evaluator.realise(half(old))
    measured = old.evaluator.measure(half(old))
    assert (measured.accuracy, measured.loss) == old.evaluator.meter.accuracy_and_loss(network)
    assert measured.steps == 0
    assert EnvConfig().measure == "instant"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": "short-trainin"}, "did you mean 'short-training'"),
        ({"short_steps": 0}, "short_steps is 0"),
        ({"short_lr": 0}, "short_lr is 0"),
        ({"short_lr": float("nan")}, "short_lr is nan"),
        ({"reward": "predicted"}, "predictor is None with the reward 'predicted'"),
        ({"predictor": "file.json"}, "predictor is 'file.json' with the reward 'accuracy'"),
    ],
)
def test_what_cannot_pay_is_refused_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        EnvConfig.of("digits-cnn", **options)
    assert "\n" not in str(caught.value)


def test_a_network_without_a_training_split_cannot_be_trained() -> None:
    data = example(20), torch.arange(20) % 5
    with pytest.raises(ValueError, match="'short-training' needs a task with a training split; 'mine' has none"):
        problem_from(build("residual"), calibration=data, search=data, name="mine", reward="short-training")


# Predictors

KNOWN = Predictor("digits-cnn", (8,), "none", True, ("log_widths", "neg_loss"), (0.25, 0.5), 0.75, plans=9, tau=0.5)


def test_a_predictor_by_hand() -> None:
    assert KNOWN.accuracy([1.0, -1.5]) == 0.75 + 0.25 - 0.75
    assert (KNOWN.accuracy([9.0, 0.0]), KNOWN.accuracy([0.0, -9.0])) == (1.0, 0.0)


def test_a_predictor_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(KNOWN.to_json())
    assert Predictor.read(tmp_path / "p.json") == KNOWN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "JSON object"),
        ('{"task": "digits-cnn"}', "JSON object of"),
        (json.dumps({**json.loads(KNOWN.to_json()), "weights": [1.0]}), "weights is"),
        (json.dumps({**json.loads(KNOWN.to_json()), "weights": [1.0, float("nan")]}), "weights is"),
        (json.dumps({**json.loads(KNOWN.to_json()), "weights": 3}), "are lists"),
        (json.dumps({**json.loads(KNOWN.to_json()), "features": ["widht", "neg_loss"]}), "features is"),
    ],
)
def test_a_file_that_holds_no_predictor_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        Predictor.read(tmp_path / "p.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        Predictor.read(tmp_path / "absent.json")


def test_an_episode_is_paid_what_the_file_foretells(task: Task, problem: Problem, tmp_path: Path) -> None:
    weights = tuple(0.002 * (i + 1) for i in range(len(FEATURES)))
    known = replace(KNOWN, channels=problem.channels, features=FEATURES, weights=weights, constant=0.25)
    options = {"reward": "predicted", "predictor": str(tmp_path / "p.json"), "refit": "none", "calibration_images": 64}
    (tmp_path / "p.json").write_text(known.to_json())
    foretelling = make_problem(task, **options)
    measured = foretelling.evaluator.measure(half(foretelling))
    at_once = foretelling.evaluator.judged(half(foretelling), foretelling.evaluator.instant)
    counts = foretelling.graph.counts(half(foretelling))[list(foretelling.steps)]
    values = [*widths(foretelling.graph, foretelling.steps, counts).values(), at_once.accuracy, -at_once.loss]
    expected = 0.25 + sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert measured.accuracy == pytest.approx(min(max(expected, 0), 1))
    assert (measured.loss, measured.steps) == (at_once.loss, 0)
    for name, other in (("task", "digits-mlp"), ("channels", (3,)), ("refit", "moments"), ("recalibrate", False)):
        (tmp_path / "p.json").write_text(replace(known, **{name: other}).to_json())
        with pytest.raises(ValueError, match=f"predictor is of {name}"):
            make_problem(task, **options)


def test_a_short_training_has_one_thread_and_its_own_rate_whatever_the_recipe_says(
    task: Task, problem: Problem
) -> None:
    bench = Bench(
        name="digits-cnn",
        graph=problem.graph,
        steps=problem.steps,
        meter=problem.evaluator.meter,
        train=task.train,
        training=TrainSettings(lr=0.5, threads=4, weight_decay=0.25),
        short_steps=7,
        short_lr=0.05,
        predictor=None,
        refit="none",
        recalibrate=True,
        device="cpu",
    )
    judge = MEASURES["short-training"](bench)
    assert isinstance(judge, ShortTraining)
    assert judge.settings == TrainSettings(lr=0.05, threads=1, weight_decay=0.25)
    assert judge.steps == 7
