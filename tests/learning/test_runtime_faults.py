"""Runtime training when something goes wrong: kills between and inside stages, losses that are no numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import runtime_options, runtime_stages, runtime_train
from agents.cli import BAD_INPUT, INTERRUPTED, guarded
from agents.runtime_agent import PpoSettings
from agents.runtime_options import RuntimeTrainConfig, Schedule
from agents.runtime_stages import RuntimeLearner
from prune_env.tasks.task import Task

SCHEDULE = Schedule(gates=2, scores=2, rounds=1, rollouts=2, network=2, final=1, ppo=PpoSettings(epochs=1))
CONFIG = RuntimeTrainConfig(epochs=0, images_at_once=16, static_batches=4, threads=1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes."""
    monkeypatch.setitem(runtime_options.SCHEDULES, "digits", SCHEDULE)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def task() -> Task:
    """Digits, untrained, with three steps an epoch."""
    made = runtime_train.task_of(CONFIG)
    few = dataclasses.replace(made.train, indices=made.train.indices[:192], labels=made.train.labels[:192])
    return dataclasses.replace(made, train=few)


@pytest.fixture(scope="module")
def whole(task: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The state that a run which nothing happened to ends in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime_options.SCHEDULES, "digits", SCHEDULE)
        return ended(RuntimeLearner(task, CONFIG, tmp_path_factory.mktemp("whole")))


def ended(learner: RuntimeLearner) -> dict[str, torch.Tensor]:
    """What is stored when a learner has worked to its end."""
    learner.run(lambda *_: None, lambda *_: None)
    assert not list(learner.folder.glob("stage*"))
    return load_file(learner.folder / "checkpoint.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@dataclass
class Fault:
    """What happens once the first report with some text arrives."""

    text: str
    happen: Callable[[], None]

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.text in what and done > 0:
            self.happen()


def interrupt() -> None:
    raise KeyboardInterrupt


INSIDE = (
    "gates : epoch 1/2",
    "scores : epoch 2/2",
    "network 1: epoch 2/2",
    "runtime agent",
    "static agent",
    "network 2",
)


@pytest.mark.parametrize("text", [*(pytest.param(text, marks=pytest.mark.slow) for text in INSIDE[:-1]), INSIDE[-1]])
def test_a_run_killed_inside_a_stage_ends_as_if_it_had_not_been(
    text: str, task: Task, tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        RuntimeLearner(task, CONFIG, tmp_path).run(Fault(text, interrupt), lambda *_: None)
    equal(whole, ended(RuntimeLearner(task, CONFIG, tmp_path)))


@pytest.mark.parametrize("stage", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(3)), 3])
def test_a_run_killed_just_after_a_stage_was_stored_ends_as_if_it_had_not_been(
    stage: int, task: Task, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = RuntimeLearner(task, CONFIG, tmp_path)
    save = learner.save

    def save_and_die() -> None:
        save()
        if learner.done == stage + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        learner.run(lambda *_: None, lambda *_: None)
    equal(whole, ended(RuntimeLearner(task, CONFIG, tmp_path)))


@pytest.mark.parametrize(
    "text",
    [
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("gates : epoch 1/2", "scores : epoch 2/2")),
        "runtime agent",
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("static agent", "network 2")),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_state_goes_on(
    text: str, task: Task, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, train, trained = RuntimeLearner(task, CONFIG, tmp_path), runtime_stages.train_gated, []
    monkeypatch.setattr(runtime_stages, "train_gated", lambda net, *a, **k: trained.append(net) or train(net, *a, **k))
    before = {name: tensor.clone() for name, tensor in learner.gated.state_dict().items()}

    def poison() -> None:
        with torch.no_grad():
            # Where channels are gone for good, what is trained is not the whole network.
            broken = learner.gated if "agent" in text else trained[-1]
            broken.layers[0].shift.fill_(float("nan"))

    with pytest.raises(ArithmeticError, match="loss") as caught:
        learner.run(Fault(text, poison), lambda *_: None)
    assert "\n" not in str(caught.value)
    if "agent" not in text:
        assert all(value.isfinite().all() for value in learner.gated.state_dict().values())
    if text.startswith("gates"):
        equal(before, learner.gated.state_dict())
    for file in tmp_path.glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file
    equal(whole, ended(RuntimeLearner(task, CONFIG, tmp_path)))


def test_a_diverging_command_says_so_in_one_line_and_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--epochs", "0", "--images-at-once", "16", "--static-batches", "4", "--threads", "1", "--lr", "1e30"]
    assert guarded(lambda: runtime_train.main([*words, "--runs", str(tmp_path)])) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "try a smaller lr than 1e+30" in said
    (run,) = tmp_path.iterdir()
    assert guarded(lambda: runtime_train.main(["--resume", str(run)])) == BAD_INPUT
    assert "try a smaller lr" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on_and_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--epochs", "0", "--images-at-once", "16", "--static-batches", "4", "--threads", "1"]
    assert runtime_train.main([*words, "--runs", str(tmp_path / "whole")]) == 0
    run = RuntimeLearner.run

    def stopped(self: RuntimeLearner, tell: Callable[..., None], log: Callable[..., None]) -> None:
        run(self, Fault("network 1: epoch 2/2", interrupt), log)

    with monkeypatch.context() as patch:
        patch.setattr(RuntimeLearner, "run", stopped)
        assert runtime_train.main([*words, "--runs", str(tmp_path / "torn")]) == INTERRUPTED
    (torn,) = (tmp_path / "torn").iterdir()
    assert f"--resume {torn}" in capsys.readouterr().out
    assert runtime_train.main(["--resume", str(torn)]) == 0
    for file in ("checkpoint.safetensors", "report.json"):
        assert (torn / file).read_bytes() == (tmp_path / "whole" / torn.name / file).read_bytes(), file


@pytest.mark.slow
def test_another_seed_is_another_run(task: Task, tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    config = RuntimeTrainConfig(epochs=0, images_at_once=16, static_batches=4, threads=1, seed=1)
    found = ended(RuntimeLearner(task, config, tmp_path))
    for part in ("gated/", "runtime/policy", "static/policy"):
        names = [name for name in whole if name.startswith(part)]
        assert any(not np.array_equal(whole[name], found[name]) for name in names), part
