"""The command of the search baselines: interrupted runs, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from agents import search_baselines, train
from agents.config import TrainConfig
from agents.episode import Episode, Memory
from agents.record import COLUMNS, RunFolder
from agents.search_baselines import SEARCHING, play
from agents.search_config import SearchConfig
from baselines.search import OPTIMISERS
from tests.learning.test_commands import ROOT, call, has_lines, until
from tests.learning.toy import toy

SHORT = ("--method", "cem", "--evaluations", "24", "--budget", "0.2", "--epochs", "3")


class Stop:
    """Interrupts after an evaluation, before it is on disk, as a kill would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def resumed(self, memory: Memory) -> None:
        pass

    def played(self, episode: Episode, *, best: bool, scalars: dict[str, float]) -> None:
        if episode.number == self.after:
            raise KeyboardInterrupt

    def saved(self, memory: Memory) -> None:
        pass


def config(method: str, **options: object) -> SearchConfig:
    return SearchConfig(algorithm=method, episodes=20, budget=0.4, **options)


def lines(run: RunFolder) -> str:
    return (run.path / "episodes.csv").read_text()


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("annealing", "bayesian"))) for name in OPTIMISERS],
)
def test_an_interrupted_run_ends_like_one_that_was_not(method: str, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole", config(method))
    memory = play(toy(), whole.config, whole)
    torn = RunFolder.create(tmp_path / "torn", config(method))
    for after in (0, 6, 13):
        with pytest.raises(KeyboardInterrupt):
            play(toy(), torn.config, torn, observers=(Stop(after),))
        with (torn.path / "episodes.csv").open("a") as file:
            file.write(f"{after},searching,{method},0.1,0.")  # a line torn by the kill
    problem = toy()
    again = play(problem, torn.config, torn)
    assert problem.evaluator.evaluations == 20 - 13
    assert again.best == memory.best
    assert torn.plan == whole.plan
    assert lines(torn) == lines(whole)


@pytest.mark.parametrize("method", OPTIMISERS)
def test_the_record_holds_every_evaluation_once_and_its_best_is_inside_the_budget(method: str, tmp_path: Path) -> None:
    problem, run = toy(), RunFolder.create(tmp_path / "run", config(method))
    memory = play(problem, run.config, run)
    rows = list(csv.DictReader(lines(run).splitlines()))
    assert len(rows) == len({row["counts"] for row in rows}) == problem.evaluator.evaluations == 20
    assert (rows[0]["source"], rows[-1]["source"]) == ("uniform", method)
    assert {row["phase"] for row in rows if row["source"] == method} == {SEARCHING}
    limit = problem.budget_of(0.4).limit
    inside = [episode for episode in memory.episodes if episode.macs <= limit]
    assert memory.inside == inside
    assert memory.best == max(inside, key=lambda episode: (episode.rank, -episode.number)).number
    assert problem.graph.macs(run.plan) == memory.episodes[memory.best].macs <= limit
    assert problem.evaluator.measure(run.plan).accuracy == memory.episodes[memory.best].accuracy
    assert run.read_episodes()[-1].rank == memory.episodes[-1].rank


def test_a_config_is_read_back_as_what_it_was(tmp_path: Path) -> None:
    searched = RunFolder.create(tmp_path / "a", config("evolution"))
    learned = RunFolder.create(tmp_path / "b", TrainConfig())
    assert searched.config == config("evolution")
    assert isinstance(searched.config, SearchConfig)
    assert type(learned.config) is TrainConfig
    assert searched.config.name != learned.config.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "first line"),
        ("a,b\n", "first line"),
        (",".join(COLUMNS) + "\n1,warm-up,uniform,0.5,0.5,0.5,9,9,1 1\n", "numbered"),
        (",".join(COLUMNS) + "\n0,warm-up,uniform,x,0.5,0.5,9,9,1 1\n", "corrupt"),
        (",".join(COLUMNS) + "\n0,warm-up\n", "corrupt"),
        (",".join(COLUMNS) + "\n0,warm-up,uniform,0.5,0.5,0.5,9,9,1 1\n", "other groups"),
        (",".join(COLUMNS) + "\n0,warm-up,uniform,0.5,0.5,0.5,9,9,1 1 1 1 99\n", "allowed counts"),
    ],
)
def test_a_corrupt_record_is_one_clear_line(text: str, said: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config("cem"))
    (run.path / "episodes.csv").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        play(toy(), run.config, run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "cme"], "did you mean 'cem'"),
        (["--method", "td3"], "allowed: random_search"),
        (["--evaluations", "0"], "an integer of at least 1"),
        (["--task", "digits-cn"], "did you mean 'cnn'"),
        (["--budget", "1.5"], "budget"),
        (["--workers", "2"], "workers"),
        (["--resume", "nowhere"], "no run folder"),
        (["--reward", "short-trainin"], "did you mean 'short-training'"),
        (["--reward", "short-training", "--short-steps", "0"], "short_steps is 0"),
        (["--reward", "predicted"], "predictor is None"),
        (["--reward", "predicted", "--predictor", "absent.json"], "No such file"),
        (["--stop-worst", ".5"], "stop_worst is 0.5 with reward 'accuracy'"),
        (["--reward", "short-training", "--stop-worst", "1"], "stop_worst is 1.0"),
        (["--reward", "short-training", "--stop-worst", ".5", "--method", "annealing"], "method 'annealing'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert search_baselines.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "runs").exists()


def test_each_command_resumes_its_own_runs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched = RunFolder.create(tmp_path / "searched", config("cem"))
    learned = RunFolder.create(tmp_path / "learned", TrainConfig())
    assert train.main(["--resume", str(searched.path)]) == 2
    assert f"python -m agents.search_baselines --resume {searched.path}" in capsys.readouterr().err
    assert search_baselines.main(["--resume", str(learned.path)]) == 2
    assert f"python -m agents.train --resume {learned.path}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_that_is_resumed_ends_like_one_that_was_not_and_agrees_with_its_record(tmp_path: Path) -> None:
    environment = {**os.environ, "PRUNE_ENV_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    whole = call("agents.search_baselines", *SHORT, "--runs", tmp_path / "whole", environment=environment)
    assert whole.returncode == 0, whole.stderr
    words = [sys.executable, "-m", "agents.search_baselines", *SHORT, "--runs", str(tmp_path / "torn")]
    name = next((tmp_path / "whole").iterdir()).name
    torn = tmp_path / "torn" / name
    for number in (3, 11):
        with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            until(partial(has_lines, torn / "episodes.csv", number))
            process.send_signal(signal.SIGKILL)
        words = [sys.executable, "-m", "agents.search_baselines", "--resume", str(torn)]
    last = call("agents.search_baselines", "--resume", torn, environment=environment)
    assert last.returncode == 0, last.stderr
    for file in ("plan.json", "episodes.csv", "report.json", "model.safetensors"):
        assert (torn / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert not [path for path in torn.iterdir() if path.name.startswith(".")]
    report = json.loads((torn / "report.json").read_text())
    assert list(report) == ["dense", "uniform", "error_curves", "learned"]
    assert report["learned"]["search_accuracy"] >= report["uniform"]["search_accuracy"]
    assert np.isfinite(report["learned"]["test_accuracy"])
    checked = call("agents.evaluate", torn, environment=environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "the record agrees" in checked.stdout
    assert call("agents.export", torn, "--out", tmp_path / "out", environment=environment).returncode == 0
