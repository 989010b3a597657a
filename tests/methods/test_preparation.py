"""What methods train before they prune: trained once, resumed, kept apart by all that decides the outcome."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from baselines.preparation import prepared_task
from prune_env import gates
from prune_env.config import make_task
from prune_env.tasks.dense import recipe
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingDiverged


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task("digits-cnn", epochs=0, root=tmp_path)


def training(task: Task, **changes: object):
    return recipe(task.data, task.network_name, seed=0, **{"epochs": 2, **changes})


def weights(task: Task) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in task.network.parameters()])


def test_a_preparation_is_trained_once(task: Task, tmp_path: Path) -> None:
    steps = []
    options = {"method": "own", "constants": {"c": 1}, "training": training(task)}
    before = weights(task).clone()
    first = prepared_task(task, **options, progress=lambda *told: steps.append(told))
    again = prepared_task(task, **options, progress=lambda *told: pytest.fail("trained again"))
    assert steps
    assert torch.equal(weights(task), before)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), before)
    assert Path(first.weights).is_relative_to(tmp_path)
    settings = dict(first.settings)
    same = make_task(settings.pop("name"), **settings)
    assert torch.equal(weights(same), weights(first))


@pytest.mark.parametrize("change", ["method", "constants", "training", "network"])
def test_whatever_decides_the_outcome_has_a_place_of_its_own(task: Task, change: str) -> None:
    options = {"method": "own", "constants": {"c": 1}, "training": training(task, epochs=1)}
    first = prepared_task(task, **options)
    if change == "network":
        with torch.no_grad():
            next(task.network.parameters()).add_(0.1)
    else:
        options[change] = {"method": "other", "constants": {"c": 2}, "training": training(task, epochs=2)}[change]
    assert prepared_task(task, **options).weights != first.weights


def test_a_killed_preparation_goes_on_to_the_same_network(task: Task) -> None:
    def kill(done: int, total: int, _: str) -> None:
        if done > total / 2 + 1:
            raise KeyboardInterrupt

    options = {"constants": {}, "training": training(task)}
    whole = prepared_task(task, method="own", **options)
    with pytest.raises(KeyboardInterrupt):
        prepared_task(task, method="other", **options, progress=kill)
    seen = []
    other = prepared_task(task, method="other", **options, progress=lambda done, *_: seen.append(done))
    assert len(seen) < seen[-1]
    assert torch.equal(weights(whole), weights(other))


def test_killed_gates_go_on_to_the_same_gates(task: Task, tmp_path: Path) -> None:
    def kill(done: int, total: int, _: str) -> None:
        if done > total / 2 + 1:
            raise KeyboardInterrupt

    whole = gates.prepared(task, epochs=2, root=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        gates.prepared(task, epochs=2, root=tmp_path / "killed", progress=kill)
    resumed = gates.prepared(task, epochs=2, root=tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_diverging_preparation_says_so_and_leaves_nothing_as_its_result(task: Task, tmp_path: Path) -> None:
    def poison(_: torch.nn.Module) -> list[Hook]:
        return [Hook(penalty=lambda state: torch.tensor(float("nan")) if state.epoch == 1 else torch.zeros(()))]

    with pytest.raises(TrainingDiverged, match="loss is nan in epoch 2"):
        prepared_task(task, method="own", constants={}, training=training(task), hooks=poison)
    left = [file.suffixes for file in (tmp_path / "prepared").glob("*.safetensors")]
    assert left == [[".checkpoint", ".safetensors"]]


def test_an_optimiser_of_ones_own_is_resumed_with_its_memory(task: Task) -> None:
    def adam(network, settings):
        return torch.optim.Adam(network.parameters(), lr=settings.lr)

    def kill(done: int, total: int, _: str) -> None:
        if done > total / 2 + 1:
            raise KeyboardInterrupt

    options = {"constants": {}, "optimizer": adam, "training": dataclasses.replace(training(task), lr=1e-3)}
    whole = prepared_task(task, method="own", **options)
    with pytest.raises(KeyboardInterrupt):
        prepared_task(task, method="other", **options, progress=kill)
    assert torch.equal(weights(prepared_task(task, method="other", **options)), weights(whole))
