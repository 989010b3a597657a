"""The table of shapers: what is run, reused and refused, and its statistics by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from safetensors.torch import save_file

from agents import plot, train
from agents.episode import Episode
from agents.record import RunFolder
from benchmarks import shaping_table
from benchmarks.interquartile import bootstrap, interquartile_mean
from benchmarks.shaping_table import NONE, Cell, Settings, best_so_far, evaluations_to, rows_of, said, verdict
from prune_env.tasks.networks import make_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the weights are, and the runs that the table made."""
    made = tmp_path_factory.mktemp("shapers")
    tensors = make_network("cnn", classes=10, channels=1, side=8, seed=0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / "dense.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "learning_figure", lambda *arguments, **options: Figure())
        patch.setattr(plot, "plan_figure", lambda *arguments, **options: Figure())
        shaping_table.main(settings(made))
        yield made


def settings(folder: Path, **changes: Any) -> Settings:
    weights, runs = str(folder / "dense.safetensors"), folder / "runs"
    usual = Settings(weights=weights, shapers=("importance",), episodes=3, seeds=(0,), runs=runs, budget=0.5)
    return dataclasses.replace(usual, **changes)


@pytest.mark.slow
def test_runs_differ_by_their_shaper_alone_and_are_made_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = settings(folder)
    assert wanted.cells == [Cell(NONE, 0), Cell("importance", 0)]
    configs = [
        RunFolder.open(wanted.runs / "episodes3" / wanted.config(cell).name).config.to_json() for cell in wanted.cells
    ]
    assert configs[0].replace('"shape": null', '"shape": "importance:1"') == configs[1]
    monkeypatch.setattr(train, "main", lambda words: pytest.fail(f"run again: {words}"))
    shaping_table.main(wanted)
    lines = capsys.readouterr().out.splitlines()
    assert [text.split(" | ")[0] for text in lines if text.startswith("| ")][2:] == ["| none", "| importance"]
    assert (folder / "runs" / "shaping.png").stat().st_size > 10_000
    record = shaping_table.read(wanted.record(wanted.cells[1]), wanted.facts(wanted.cells[1]))
    assert (record["shape"], record["weights"], len(record["best"])) == ("importance:1", "dense.safetensors", 3)
    assert record["best"][-1] == record["rows"]["learned"]["search_accuracy"]
    with pytest.raises(ValueError, match=r"has weights dense\.safetensors, not None"):
        shaping_table.main(settings(folder, weights=None, only_print=True))


def test_what_no_run_would_take_is_refused_before_the_first() -> None:
    with pytest.raises(ValueError, match="shaper 'skop' is unknown; did you mean 'scop'"):
        Settings(shapers=("skop",))
    with pytest.raises(ValueError, match="algorithm 'td4' is unknown"):
        Settings(algorithm="td4")
    with pytest.raises(ValueError, match="the weight of shaper"):
        Settings(weight=-1.0)
    assert Settings(fade=50, weight=0.5).config(Cell("scop", 1)).shape == "scop:0.5:50"


def test_curves_by_hand() -> None:
    pairs = [(0.5, 1.0), (0.4, 0.1), (0.5, 0.9), (0.7, 1.0)]
    episodes = [Episode(i, "", "", a, a - 0.1 * (i == 2), loss, 1, 1, (1,)) for i, (a, loss) in enumerate(pairs)]
    assert best_so_far(episodes) == [0.5, 0.5, 0.4, 0.7]  # the third has the lower loss, whatever its accuracy
    assert evaluations_to([0.5, 0.6, 0.7], 0.6) == 2
    assert evaluations_to([0.5], 0.6) == math.inf


def test_the_interquartile_mean_by_hand() -> None:
    five = np.array([100.0, 1, 2, 3, -50])[:, None]
    assert interquartile_mean(five) == 2  # one goes at each end
    assert interquartile_mean(np.array([[1.0, 3.0], [2.0, 100.0]])) == 2.5  # two tasks, all runs together
    assert interquartile_mean(np.array([[[1.0, 5.0]], [[3.0, 7.0]]])).tolist() == [2, 6]
    assert interquartile_mean(np.array([1.0, 2, 3, math.inf])[:, None]) == 2.5
    assert interquartile_mean(np.array([1.0, 2, math.inf, math.inf])[:, None]) == math.inf


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(-5, 5))
def test_intervals_hold_their_mean_and_move_with_the_scores(values: list[float], by: float) -> None:
    scores = np.array(values)[:, None]
    low, high = bootstrap(scores, resamples=100)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap(scores + by, resamples=100) == pytest.approx([low + by, high + by], abs=1e-9)
    assert bootstrap(scores, resamples=100).tolist() == [low, high]


def test_runs_are_drawn_within_their_tasks() -> None:
    # no resample can mix the tasks, so the middle half of two constant tasks never moves
    assert bootstrap(np.array([[0.0, 1.0]] * 4), resamples=50).tolist() == [0.5, 0.5]
    # of two runs, a quarter of the resamples has one of them twice
    assert bootstrap(np.array([[0.0], [1.0]]), resamples=200).tolist() == [0, 1]


def record(shaper: str, seed: int, best: list[float], **changes: Any) -> dict[str, Any]:
    row = {"search_accuracy": best[-1], "test_accuracy": best[-1] - 0.1}
    rows = {"learned": row, "policy": {**row, "search_accuracy": 0.5}}
    return {"shaper": shaper, "seed": seed, "best": best, "own": 0.4, "rows": rows, **changes}


HAND = [
    record(NONE, 0, [0.5, 0.6, 0.7]),
    record(NONE, 1, [0.5, 0.5, 0.8]),
    record("scop", 0, [0.7, 0.7, 0.9]),
    record("scop", 1, [0.7, 0.8, 0.8]),
    record("importance", 0, [0.1, 0.1, 0.1]),
    record("importance", 1, [0.1, 0.1, 0.1]),
    record("polarization", 2, [0.9, 0.9, 0.9]),  # nothing to compare it with
]


def test_the_table_by_hand() -> None:
    lines = shaping_table.table(rows_of(HAND)).splitlines()[2:]
    assert [text.split(" | ")[0] for text in lines] == ["| none", "| scop", "| importance"]
    assert lines[1] == (
        "| scop | 85.00 (80.00 to 90.00) | 76.67 (76.67 to 76.67) | +16.67 (+16.67 to +16.67) | 2 (1 to 2) | 2 of 2 "
        "| 40.00 (40.00 to 40.00) | 50.00 (50.00 to 50.00) | 75.00 (70.00 to 80.00) | 90.00, 80.00 |"
    )
    assert " | > 3 (> 3 to > 3) | 0 of 2 | " in lines[2]


def test_a_verdict_needs_seeds_and_a_difference() -> None:
    third = [{**one, "seed": 3} for one in HAND if one["seed"] == 0]
    assert verdict(rows_of([*HAND, *third])) == "faster with scop; slower with importance"
    same = [{**one, "shaper": "scop"} for one in [*HAND, *third] if one["shaper"] == NONE]
    for few in (HAND, [*HAND[:2], third[0], *same]):
        assert verdict(rows_of(few)) == "no shaper makes a difference beyond the seeds"


def test_what_is_said_of_one_seed_and_of_none() -> None:
    assert said(np.array([[1.5]])) == "1.50"
    assert shaping_table.table([]).count("\n") == 1
