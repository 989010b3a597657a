"""Image folders of a user's own, at a size of the user's own, through every command that makes a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agents import compare, train
from agents.comparison import Comparison
from agents.config import TrainConfig
from agents.runtime_options import RuntimeTrainConfig
from agents.runtime_options import task_of as runtime_task_of
from agents.search_config import SearchConfig
from agents.train import make_task_of
from prune_env.tasks.task import Task

SIZES = {"image_size": 12, "search_size": 7, "normalise": "half", "epochs": 0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of 24 images to train on and 8 to test on, as the data root."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "imagefolder" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128, (20, 20, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "imagefolder" / part / name / f"{index}.png")
    monkeypatch.setenv("PRUNE_ENV_DATA", str(tmp_path))
    return tmp_path


def tasks() -> dict[str, Task]:
    comparison = Comparison(tasks=("imagefolder-resnet20",), methods=("uniform", "cem", "fbs"), seeds=(0,), **SIZES)
    cell = next(cell for cell in comparison.cells if cell.method == "cem")
    return {
        "train": make_task_of(TrainConfig(task="imagefolder-resnet20", **SIZES)),
        "search": make_task_of(SearchConfig(task="imagefolder-resnet20", algorithm="cem", **SIZES)),
        "runtime": runtime_task_of(RuntimeTrainConfig(task="imagefolder-resnet20", **SIZES)),
        "compare": comparison.task(cell),
        "a cell's run": make_task_of(comparison.train_config(cell, file=None)),
        "a cell's runtime run": runtime_task_of(comparison.runtime_config(cell, trust=0.5, file=None)),
    }


def test_every_command_makes_the_same_task_of_the_sizes_it_is_told(folder: Path) -> None:
    for name, task in tasks().items():
        assert task.example.shape == (1, 3, 12, 12), name
        assert (len(task.train), len(task.search)) == (41, 7), name
        assert str(task.normalise) == "0.5,0.5,0.5,0.5,0.5,0.5", name


@pytest.mark.slow
def test_a_run_on_ones_own_images_ends_and_says_how_large_they_are(folder: Path, tmp_path: Path) -> None:
    words = ["--task", "imagefolder-resnet20", "--image-size", "12", "--search-size", "9", "--epochs", "0"]
    few = ["--budget", "0.5", "--episodes", "2", "--random-plans", "0", "--calibration-images", "16", "--threads", "1"]
    assert train.main([*words, *few, "--runs", str(tmp_path / "runs")]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    config = TrainConfig.from_json((run / "config.json").read_text())
    assert (config.image_size, config.search_size) == (12, 9)


@pytest.mark.parametrize(("option", "value"), [("--image-size", "0"), ("--search-size", "0"), ("--search-size", "47")])
def test_a_size_that_will_not_do_is_refused_by_name_and_leaves_nothing(
    option: str, value: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "imagefolder-resnet20", "--epochs", "0", option, value, "--runs", str(tmp_path / "runs")]
    assert train.main(words) == 2
    assert f"{option[2:].replace('-', '_')} is {value}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    of_tasks = ["--tasks" if word == "--task" else word for word in words]
    assert compare.main([*of_tasks, "--methods", "uniform"]) == 2
    assert f"{option[2:].replace('-', '_')} is {value}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
