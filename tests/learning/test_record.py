from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import record
from agents.config import TrainConfig
from agents.episode import Episode, Memory, Trajectory
from agents.record import RunFolder

CONFIG = TrainConfig(episodes=3)


def memory_of(episodes: int) -> Memory:
    memory = Memory()
    for i in range(episodes):
        seen = {"a": np.full((2, 1), i, np.float32), "b": np.ones((2, 3), np.float32)}
        actions = np.full((2, 1), i / 10, np.float32)
        one = Episode(i, "warm-up", "uniform", 0.1 * i, 0.1 * i, 1.0, 10, 5, (1, 2), {"accuracy": 0.1 * i})
        memory.add(one, Trajectory(seen, actions, actions, np.zeros(len(actions))))
    return memory


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_appears_with_its_config_and_never_twice(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run", CONFIG)
    assert run.config == CONFIG
    with pytest.raises(ValueError, match=r"already exists.*--resume"):
        RunFolder.create(run.path, CONFIG)


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.create(tmp_path / "deep" / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.save(memory_of(1), {"w": torch.ones(2)}, {"chunks": 1})
    with monkeypatch.context() as patch:
        patch.setattr(record.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run.save(memory_of(2), {"w": torch.ones(2)}, {"chunks": 2})
    stored = run.restore()
    assert stored is not None
    assert (len(stored[0]), stored[2]) == (1, {"chunks": 1})
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint.safetensors", "config.json"]


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    run, memory = RunFolder.create(tmp_path / "run", CONFIG), memory_of(3)
    run.save(memory, {"w": torch.arange(3)}, {"chunks": 4})
    stored = run.restore()
    assert stored is not None
    again, agent, state = stored
    assert again.episodes == memory.episodes
    assert again.best == 2
    assert torch.equal(agent["w"], torch.arange(3))
    assert state == {"chunks": 4}
    for one, other in zip(again.trajectories, memory.trajectories, strict=True):
        np.testing.assert_array_equal(one.applied, other.applied)
        np.testing.assert_array_equal(one.seen["a"], other.seen["a"])


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path: Path, keep: int) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.save(memory_of(2), {"w": torch.ones(2)}, {"chunks": 1})
    path = run.path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is corrupt") as caught:
        run.restore()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tusk": "digits-cnn"}', '{"algorithm": "td4"}', '{"budget": "x"}'])
def test_a_corrupt_config_is_one_clear_line(tmp_path: Path, text: str) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    (run.path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is corrupt") as caught:
        _ = run.config
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folder"):
        RunFolder.open(tmp_path)


def test_a_corrupt_report_and_a_missing_plan_are_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    (run.path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is corrupt"):
        _ = run.report
    with pytest.raises(ValueError, match=r"plan\.json is missing"):
        _ = run.plan


def test_among_equal_rewards_the_lower_loss_is_best_and_then_the_earlier() -> None:
    memory = memory_of(1)
    for number, loss in ((1, 0.5), (2, 0.4), (3, 0.4)):
        memory.add(Episode(number, "learning", "policy", 0.7, 0.7, loss, 1, 1, (1,)), memory.trajectories[0])
    assert memory.best == 2
