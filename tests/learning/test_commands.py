from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agents import evaluate, export, train
from agents.config import TrainConfig
from agents.record import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "digits-cn"], "did you mean 'cnn'"),
        (["--task", "digitz-cnn"], "digits"),
        (["--network", "resnet21"], "resnet"),
        (["--algorithm", "td4"], "did you mean 'td3'"),
        (["--importance", "taylr"], "did you mean 'taylor'"),
        (["--reward", "acuracy"], "did you mean 'accuracy'"),
        (["--budget", "0"], "budget"),
        (["--budget", "1.5"], "budget"),
        (["--budget", "x"], "budget"),
        (["--budget-resource", "mac"], "macs"),
        (["--episodes", "0"], "episodes"),
        (["--shape", "channel_gatin"], "did you mean 'channel_gating'"),
        (["--shape", "scop:-1"], "the weight of shaper 'scop' is -1.0"),
        (["--shape", "scop:1:0"], "fades over 0 episodes"),
        (["--shape", "scop:heavy"], "NAME[:WEIGHT[:EPISODES]] is allowed"),
        (["--no-such-option", "1"], "no-such-option"),
        (["--resume", "nowhere"], "no run folder"),
        (["--weights", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, *([] if "--resume" in arguments else ["--runs", "runs"])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "runs").exists()


def weights(path: Path, *, value: float | None = None) -> Path:
    from prune_env.tasks.networks import make_network

    tensors = make_network("cnn", classes=10, channels=1, side=8, seed=0).state_dict()
    if value is not None:
        tensors = {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("damage", ["nan", "truncated", "other", "budget"])
def test_weights_or_a_budget_that_will_not_do_leave_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = weights(tmp_path / "w.safetensors", value=float("nan") if damage == "nan" else None)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if damage == "other":
        save_file({"conv1.weight": torch.ones(3)}, file)
    budget = "0.0001" if damage == "budget" else "0.5"
    assert train.main(["--weights", str(file), "--budget", budget, "--runs", "runs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert damage != "budget" or "smallest" in error or "minimum" in error
    assert not (tmp_path / "runs").exists()


def test_an_existing_or_corrupt_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(seed=5)
    run = RunFolder.create(tmp_path / config.name, config)
    assert train.main(["--seed", "5", "--runs", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    for command in (evaluate.main, lambda words: export.main([*words, "--out", str(tmp_path / "out")])):
        assert command([str(run.path)]) == 2
        assert "not finished" in capsys.readouterr().err
    (run.path / "config.json").write_text("{")
    assert train.main(["--resume", str(run.path)]) == 2
    assert "corrupt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "drawn"), [*(pytest.param(*n, marks=pytest.mark.slow) for n in ((None, 2), (3, 3))), (0, 0)]
)
def test_the_report_draws_as_many_random_plans_as_it_is_told(asked: int | None, drawn: int, tmp_path: Path) -> None:
    file = weights(tmp_path / "w.safetensors")
    words = ["--weights", str(file), "--budget", "0.5", "--episodes", "2", "--threads", "1", "--runs", str(tmp_path)]
    assert train.main([*words, *([] if asked is None else ["--random-plans", str(asked)])]) == 0
    report = RunFolder.open(tmp_path / TrainConfig(budget=0.5).name).report
    assert report.get("random", {"tried": 0})["tried"] == drawn
    assert list(report) == ["dense", "uniform", "error_curves", *(["random"] if drawn else []), "learned", "policy"]
    # rows without an evaluation are the plans that the agent is given
    known = {e.source: list(e.counts) for e in RunFolder.open(tmp_path / TrainConfig(budget=0.5).name).read_episodes()}
    assert known == {name: report[name]["counts"] for name in ("uniform", "error_curves")}


def call(module: str, *arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = str(tmp_path_factory.mktemp("data"))
    return {**os.environ, "PRUNE_ENV_DATA": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


SHORT = ("--episodes", 24, "--chunk", 4, "--budget", 0.2, "--epochs", 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_that_is_resumed_ends_like_one_that_was_not(environment: dict[str, str], tmp_path: Path) -> None:
    whole = call("agents.train", *SHORT, "--runs", tmp_path / "whole", environment=environment)
    assert whole.returncode == 0, whole.stderr
    words = [sys.executable, "-m", "agents.train", *map(str, SHORT), "--runs", str(tmp_path / "torn")]
    name = next((tmp_path / "whole").iterdir()).name
    torn = tmp_path / "torn" / name
    for lines in (6, 14):
        with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            until(partial(has_lines, torn / "episodes.csv", lines))
            process.send_signal(signal.SIGKILL)
        words = [sys.executable, "-m", "agents.train", "--resume", str(torn)]
    last = call("agents.train", "--resume", torn, environment=environment)
    assert last.returncode == 0, last.stderr
    for file in ("plan.json", "episodes.csv", "report.json", "model.safetensors"):
        assert (torn / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert not [path for path in torn.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_says_how_to_go_on_and_a_fresh_process_agrees_with_the_record(
    environment: dict[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "agents.train", *map(str, SHORT), "--workers", "2", "--fine-tune-epochs", "1"]
    words += ["--runs", str(tmp_path)]
    name = ""
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: any(path.joinpath("plan.json").exists() for path in tmp_path.iterdir()))
        name = next(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {tmp_path / name}" in output
    resumed = call("agents.train", "--resume", tmp_path / name, environment=environment)
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads((tmp_path / name / "report.json").read_text())
    assert list(report) == ["dense", "uniform", "error_curves", "random", "learned", "policy"]
    assert all("fine_tuned_test_accuracy" in report[row] for row in ("uniform", "error_curves", "random", "learned"))
    checked = call("agents.evaluate", tmp_path / name, environment=environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "the record agrees" in checked.stdout
    assert call("agents.export", tmp_path / name, "--out", tmp_path / "out", environment=environment).returncode == 0
    code = f"import prune_env, torch; print(prune_env.load({str(tmp_path / 'out')!r})(torch.zeros(1, 1, 8, 8)).shape)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[1, 10]" in loaded.stdout


def has_lines(path: Path, lines: int) -> bool:
    """Whether a file has more than so many lines."""
    return path.exists() and path.read_text().count("\n") > lines


def until(condition, *, seconds: float = 200.0) -> None:
    """Wait."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
