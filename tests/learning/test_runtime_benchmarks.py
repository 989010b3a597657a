"""The table and the picture of runtime pruning: what they make, what they reuse, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agents import runtime_options, runtime_train
from agents.runtime_agent import PpoSettings
from agents.runtime_options import RuntimeTrainConfig, Schedule
from benchmarks import budgets_served, runtime_runs, runtime_table, trust_sweep
from prune_env.pruning.gating.accounting import Accounting

TINY = Schedule(gates=1, scores=0, rounds=1, rollouts=1, network=1, final=1, ppo=PpoSettings(epochs=1))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs that the table made."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime_options.SCHEDULES, "digits", TINY)
        runtime_table.main(table(folder))
    return folder


@pytest.fixture(autouse=True)
def trained_no_more(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is reused."""

    def never(*args: object, **options: object) -> int:
        raise AssertionError("trained again")

    monkeypatch.setitem(runtime_options.SCHEDULES, "digits", TINY)
    monkeypatch.setattr(runtime_train, "main", never)
    monkeypatch.setattr(runtime_table, "run_runtime", never)


def table(runs: Path, **changes: object) -> runtime_table.Settings:
    rows = ("static", "fbs", "runtime")
    return dataclasses.replace(runtime_table.Settings(runs=runs, epochs=0, rows=rows), **changes)


def test_all_rows_meet_one_budget_with_the_same_training(runs: Path) -> None:
    records = runtime_table.records(table(runs))
    assert [record["row"] for record in records] == ["static", "fbs", "runtime"]
    assert {record["epochs"] for record in records} == {3}
    assert len({record["dense"]["test"] for record in records}) == 1
    config = table(runs).config(0)
    forms = Accounting.of(runtime_table.attached(runtime_train.task_of(config)))
    budget = forms.even_macs(0.5) / forms.dense_macs
    for record in records:
        assert budget - 0.03 < record["search"]["dynamic_macs_share"] < budget + 0.01
    assert str(runs) not in json.dumps(records)


def test_the_table_comes_from_the_records(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime_table.main(table(runs))
    whole = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in whole[2:]] == [
        "| dense",
        "| static only, R = 0",
        "| FBS",
        "| runtime only, R = 1",
    ]
    assert all(line.count("|") == whole[0].count("|") for line in whole)
    runtime_table.main(table(runs, only_print=True, rows=("fbs", "both")))
    some = capsys.readouterr().out.splitlines()
    assert [line for line in some if "FBS" in line] == [line for line in whole if "FBS" in line]
    assert not any("both" in line for line in some)


def test_means_and_distances_by_hand() -> None:
    percentiles = {"5": 0.25, "95": 0.35}
    test = {
        "accuracy": 0.9,
        "dynamic_macs_share": 0.25,
        "dynamic_macs_percentiles": percentiles,
        "params_share": 0.8,
        "varying_channels": [0.5, 0.0],
    }
    times = {"1": {"dense": 4.0, "deployed": 1.0}, "2": {"dense": 2.0, "deployed": 0.5}}
    one = {"row": "both", "seed": 0, "dense": {"test": 0.92}, "test": test, "latency_ms": times}
    other = {**one, "seed": 1, "dense": {"test": 0.93}, "test": {**test, "accuracy": 0.88}}
    lines = runtime_table.table([{**other, "latency_ms": times}, one]).splitlines()
    assert lines[2:] == [
        "| dense | 92.50 | | 1.00x | 1.000 | 0 % | 1.00 | 4.00, 2.00 | 92.00, 93.00 |",
        "| both, R = .5 | 89.00 | -3.50 | 4.00x | 0.250-0.350 | 25 % | 0.80 | 1.00 (4.00x), 0.50 (4.00x) "
        "| 90.00 (-2.00), 88.00 (-5.00) |",
    ]


def test_rows_of_another_folder_are_read_from_finished_runs(runs: Path, tmp_path: Path) -> None:
    settings = table(runs, records=tmp_path, rows=("static", "runtime"))
    runtime_table.main(settings)
    assert runtime_table.records(settings) == runtime_table.records(dataclasses.replace(settings, records=None))


def test_deployed_networks_are_timed_and_the_record_keeps_it(runs: Path) -> None:
    settings = table(runs, rows=("fbs", "runtime"), latency=(1,))
    runtime_table.main(settings)
    for record in runtime_table.records(settings):
        assert set(record["latency_ms"]["1"]) == {"dense", "deployed"}


def test_a_folder_with_another_run_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a run with epochs 0, not 4"):
        runtime_table.main(table(runs, epochs=4, records=tmp_path))
    with pytest.raises(ValueError, match="row 'fsb' is unknown"):
        table(runs, rows=("fsb",))


def test_an_unfinished_run_is_resumed(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RuntimeTrainConfig(keep=0.5, threads=1, seed=5, epochs=0)
    calls: list[list[str]] = []
    monkeypatch.setattr(runtime_train, "main", lambda words: calls.append(words) or runtime_runs.INTERRUPTED)
    with pytest.raises(KeyboardInterrupt):
        runtime_runs.learned(config, tmp_path)
    (tmp_path / config.name).mkdir()
    (tmp_path / config.name / "config.json").write_text(config.to_json())
    with pytest.raises(KeyboardInterrupt):
        runtime_runs.learned(config, tmp_path)
    asked = ["--epochs", "0", "--keep", "0.5", "--threads", "1", "--seed", "5"]
    assert calls == [[*asked, "--runs", str(tmp_path)], ["--resume", str(tmp_path / config.name)]]


def test_the_sweep_draws_the_runs_of_the_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "sweep.png"
    settings = trust_sweep.Settings(runs=runs, epochs=0, trusts=(1.0, 0.0), out=out)
    trust_sweep.main(settings)
    assert trust_sweep.records(settings)[1.0] in runtime_table.records(table(runs))
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "digits-cnn" in capsys.readouterr().out
    found = trust_sweep.records(dataclasses.replace(settings, trusts=(0.0, 0.5, 1.0), only_draw=True))
    assert list(found) == [0.0, 1.0]
    (axes,) = trust_sweep.figure("digits-cnn", 0.5, found).axes
    reference, line = axes.get_lines()
    assert set(reference.get_ydata()) == {100 * found[0.0]["dense"]["test"]}
    tests = [found[trust]["test"] for trust in (0.0, 1.0)]
    assert list(line.get_xdata()) == [test["params_share"] for test in tests]
    assert list(line.get_ydata()) == [100 * test["accuracy"] for test in tests]
    assert [text.get_text() for text in axes.texts] == ["R = 0", "R = 1"]
    with pytest.raises(ValueError, match="no record of a run"):
        trust_sweep.records(dataclasses.replace(settings, runs=tmp_path, only_draw=True))
    with pytest.raises(ValueError, match=r"runtime_trust is 1\.5"):
        trust_sweep.records(dataclasses.replace(settings, trusts=(1.5,)))


def test_a_run_is_asked_at_several_budgets(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / table(runs).config(0, 1.0).name
    settings = budgets_served.Settings(run=run, factors=(0.8, 1.0), threads=1, out=tmp_path / "rows.json")
    budgets_served.main(settings)
    assert run.name in capsys.readouterr().out
    tighter, own = json.loads(settings.out.read_text())
    learned = json.loads((run / "report.json").read_text())["learned"]["test"]
    assert own["accuracy"] == pytest.approx(learned["accuracy"])
    assert own["dynamic_macs"] == pytest.approx(learned["dynamic_macs"])
    assert tighter["budget"] == pytest.approx(0.8 * own["budget"])
    assert tighter["dynamic_macs"] < own["dynamic_macs"]
    (run / "report.json").rename(tmp_path / "report.json")
    try:
        with pytest.raises(ValueError, match="is not finished"):
            budgets_served.rows(settings)
    finally:
        (tmp_path / "report.json").rename(run / "report.json")
