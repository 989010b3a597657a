"""Lengths of the training after the cut: whole epochs, or a share of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.comparison import Comparison
from agents.config import TrainConfig
from agents.report import fine_tuned
from prune_env.tasks.task import Task, make_task


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task("digits-cnn", epochs=0)


def trained_on(task: Task, epochs: int | float, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Steps that were told, and the trained weights."""
    config, steps = TrainConfig(task="digits-cnn", fine_tune_epochs=epochs), []
    network = fine_tuned(
        task.network, task, config, checkpoint=folder / f"{epochs}.st", progress=lambda done, *_: steps.append(done)
    )
    return max(steps), network.state_dict()


def test_a_share_of_an_epoch_is_one_pass_over_so_many_images(task: Task, tmp_path: Path) -> None:
    whole, _ = trained_on(task, 1, tmp_path)
    quarter, _ = trained_on(task, 0.25, tmp_path)
    assert len(task.train) // 64 == whole
    assert len(task.train) // 4 // 64 == quarter


def test_a_share_says_how_many_images_of_the_split_are_shown(task: Task, tmp_path: Path) -> None:
    half = (len(task.train) + 1) // 2
    swapped = torch.cat([torch.arange(half), torch.arange(half, len(task.train)).flip(0)])
    other = replace(task, train=task.train.at(swapped))
    (tmp_path / "other").mkdir()
    for share, same in ((0.5, True), (1, False)):
        steps, weights = trained_on(task, share, tmp_path)
        again, others = trained_on(other, share, tmp_path / "other")
        assert steps == again
        assert all(torch.equal(weights[name], others[name]) for name in weights) is same


@pytest.mark.parametrize("make", [Comparison, TrainConfig])
def test_whole_epochs_are_recorded_as_whole_numbers(make: type[Comparison] | type[TrainConfig]) -> None:
    assert '"fine_tune_epochs": 2,' in make(fine_tune_epochs=2.0).to_json()
    assert '"fine_tune_epochs": 0.5,' in make(fine_tune_epochs=0.5).to_json()
    assert make.from_json(make(fine_tune_epochs=0.5).to_json()).fine_tune_epochs == 0.5


@pytest.mark.parametrize("make", [Comparison, TrainConfig])
@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), float("inf"), True])
def test_other_lengths_are_refused_by_name(make: type[Comparison] | type[TrainConfig], value: int | float) -> None:
    with pytest.raises(ValueError, match=f"fine_tune_epochs is {value}; a whole number, or a share"):
        make(fine_tune_epochs=value)
