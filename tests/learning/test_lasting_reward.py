"""Runs paid by what lasts: records, replays, races that resume, names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents import evaluate, search_baselines, train
from agents.config import TrainConfig
from agents.record import EARLIER, RunFolder
from agents.search_baselines import play
from agents.search_config import SearchConfig
from agents.train import make_task_of, problem_of
from prune_env.envs.dynamics import Problem
from tests.learning.test_search_baselines import Stop, lines

SHORT = {"reward": "short-training", "short_steps": 4, "short_lr": 0.05, "epochs": 0, "calibration_images": 64}
RACE = SearchConfig(algorithm="random_search", episodes=9, budget=0.4, stop_worst=0.6, **SHORT)
WORDS = ("--reward", "short-training", "--short-lr", ".05", "--epochs", "0", "--calibration-images", "64")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(make_task_of(RACE), RACE)


@pytest.mark.slow
def test_an_interrupted_race_ends_like_one_that_was_not(problem: Problem, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole", RACE)
    memory = play(problem, RACE, whole)
    torn = RunFolder.create(tmp_path / "torn", RACE)
    for after in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            play(problem, RACE, torn, observers=(Stop(after),))
    again = play(problem, RACE, torn)
    assert lines(torn) == lines(whole)
    assert torn.plan == whole.plan
    assert [episode.rungs for episode in again.episodes] == [episode.rungs for episode in memory.episodes]
    stopped = [episode for episode in memory.episodes if episode.steps < 4]
    assert stopped, "nobody was stopped: the test shows nothing"
    assert all(episode.reward < 0 <= memory.episodes[memory.best].reward for episode in stopped)
    assert {len(episode.rungs) for episode in memory.episodes if episode.steps == 4} == {3}
    assert problem.evaluator.measure(whole.plan).accuracy == memory.episodes[memory.best].accuracy
    assert sum(episode.steps for episode in memory.episodes) < 4 * len(memory)


def test_a_search_says_what_paid_it_and_its_record_can_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "cem", "--evaluations", "6", "--short-steps", "3", "--stop-worst", ".5", *WORDS]
    assert search_baselines.main([*words, "--threads", "1", "--runs", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert "-short-training3-lr0.05-stop0.5-" in path.name
    assert "paid by short-training" in " ".join(capsys.readouterr().out.split())
    _agrees(path, steps=3)
    record = json.loads((path / "config.json").read_text())
    assert (record["short_steps"], record["short_lr"], record["stop_worst"]) == (3, 0.05, 0.5)


@pytest.mark.slow
def test_an_agent_says_what_paid_it_and_its_record_can_be_replayed(tmp_path: Path) -> None:
    words = ["--episodes", "4", "--chunk", "2", "--short-steps", "2", *WORDS, "--threads", "1"]
    assert train.main([*words, "--runs", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    _agrees(path, steps=2)
    assert {episode.steps for episode in RunFolder.open(path).read_episodes()} == {2}


def _agrees(path: Path, *, steps: int) -> None:
    """The report names the measure, the best episode was paid just that, and a replay finds the same."""
    run = RunFolder.open(path)
    row, best = run.report["learned"], max(run.read_episodes(), key=lambda episode: episode.rank)
    assert (row["paid_by"], row["paid_steps"], row["paid_accuracy"]) == ("short-training", steps, best.accuracy)
    assert "paid_by" in run.report["uniform"]
    assert evaluate.main([str(path)]) == 0
    run.add_row("learned", row | {"paid_accuracy": row["paid_accuracy"] + 0.01})
    assert evaluate.main([str(path)]) == evaluate.DISAGREES


def test_runs_that_are_paid_otherwise_have_other_names(tmp_path: Path) -> None:
    usual = TrainConfig()
    others = [
        TrainConfig(reward="short-training"),
        TrainConfig(reward="short-training", short_steps=20),
        TrainConfig(reward="short-training", short_lr=0.05),
        TrainConfig(reward="predicted", predictor="p.json"),
    ]
    assert len({one.name for one in (usual, *others)}) == 5
    assert TrainConfig(reward="instant").name == usual.name == "digits-cnn-td3-l1-macs0.5-seed0"
    assert all(TrainConfig.from_json(one.to_json()) == one for one in others)
    assert RunFolder.create(tmp_path / "run", RACE).config == RACE


def test_episodes_from_before_there_were_short_trainings_are_read(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", TrainConfig())
    (run.path / "episodes.csv").write_text(",".join(EARLIER) + "\n0,warm-up,uniform,0.5,0.5,0.7,9,8,1 2\n")
    (episode,) = run.read_episodes()
    assert (episode.counts, episode.steps, episode.rungs) == ((1, 2), 0, ())
