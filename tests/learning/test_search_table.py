"""The table of searches: what is run, what is reused, what is refused, and its statistics by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from safetensors.torch import save_file

from agents import callbacks, intervals, plot, search_baselines, train
from agents.cli import INTERRUPTED
from agents.config import own_settings
from agents.record import RunFolder
from benchmarks import search_table
from benchmarks.search_table import Cell, Settings
from prune_env.tasks.networks import make_network

METHODS = ("random_search", "amc")


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Iterator[None]:
    """Half of a tiny run's time would be its pictures, which are other tests' matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "png", lambda figure: b"")
        patch.setattr(plot, "learning_figure", lambda *arguments, **options: None)
        patch.setattr(plot, "plan_figure", lambda *arguments, **options: Figure())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the weights are, and the runs that the table made."""
    made = tmp_path_factory.mktemp("searches")
    tensors = make_network("cnn", classes=10, channels=1, side=8, seed=0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / "dense.safetensors")
    search_table.main(settings(made))
    return made


@pytest.fixture
def run_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is reused."""

    def never(arguments: list[str]) -> int:
        raise AssertionError(f"run again: {arguments}")

    monkeypatch.setattr(search_baselines, "main", never)
    monkeypatch.setattr(train, "main", never)


def settings(folder: Path, **changes: Any) -> Settings:
    weights, runs = str(folder / "dense.safetensors"), folder / "runs"
    usual = Settings(weights=weights, methods=METHODS, evaluations=(3,), seeds=(0,), runs=runs)
    return dataclasses.replace(usual, **changes)


def test_all_cells_spend_the_same_evaluations_under_the_same_repair(folder: Path) -> None:
    wanted = settings(folder)
    records = search_table.recorded(wanted)
    assert [record["method"] for record in records] == list(METHODS)
    assert {record["spent"] for record in records} == {3}
    assert all(record["seconds"] > 0 for record in records)
    for cell, record in zip(wanted.cells, records, strict=True):
        run = RunFolder.open(wanted.folder(cell) / wanted.config(cell).name)
        assert run.config == wanted.config(cell)
        assert (run.config.importance, run.config.refit, run.config.recalibrate) == ("l1", "auto", True)
        assert (run.config.calibration_images, run.config.fine_tune_epochs, run.config.budget) == (512, 0, 0.5)
        report, found = run.report, record["rows"]["found"]
        assert found["test_accuracy"] == report["learned"]["test_accuracy"]
        assert found["search_accuracy"] == max(episode.accuracy for episode in run.read_episodes())
        assert found["macs_share"] == report["learned"]["macs"] / report["dense"]["macs"] <= 0.5
        assert found["params_share"] == report["learned"]["params"] / report["dense"]["params"]
        assert found["counts"] == report["learned"]["counts"]
        agent = {"policy"} if cell.method == "amc" else set()
        assert set(record["rows"]) == {"dense", "uniform", "error_curves", "found", *agent}


def test_what_an_algorithm_sets_for_itself_is_recorded_and_shown(
    folder: Path, run_no_more: None, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {record["method"]: record["own"] for record in search_table.recorded(settings(folder))}
    assert own == {"random_search": {}, "amc": {"min_keep": 0.2, "warm_up": 50}}
    search_table.main(settings(folder))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "min_keep 0.2, warm_up 50" in line] == ["| amc"]
    paper = settings(folder, methods=("amc_paper",)).config(Cell("amc_paper", 3, 0))
    assert (paper.importance, paper.refit, paper.recalibrate, paper.calibration_images) == ("l1", "auto", True, 512)
    assert own_settings(paper, decided=search_table.COMMON) == {"min_keep": 0.2, "round_to": 8, "warm_up": 100}


def test_a_record_names_no_folder(folder: Path) -> None:
    for record in search_table.recorded(settings(folder)):
        assert record["weights"] == "dense.safetensors"
        assert "/" not in json.dumps(record)
        assert str(folder) not in json.dumps(record)


def test_a_recorded_cell_is_not_run_again(
    folder: Path, run_no_more: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = settings(folder).record(Cell("amc", 3, 0)).parent
    search_table.main(settings(folder))
    whole = capsys.readouterr().out
    moved = settings(folder, runs=tmp_path / "elsewhere", records=records)
    search_table.main(moved)
    assert capsys.readouterr().out == whole
    assert not (tmp_path / "elsewhere").exists()
    search_table.main(settings(folder, only_print=True, seeds=(0, 7)))
    assert capsys.readouterr().out == whole


def test_a_finished_run_without_a_record_is_only_read(folder: Path, run_no_more: None, tmp_path: Path) -> None:
    again = settings(folder, records=tmp_path / "new")
    for cell in again.cells:
        search_table.made(again, cell)
    assert search_table.recorded(again) == search_table.recorded(settings(folder))


@pytest.mark.parametrize("method", [METHODS[0], pytest.param(METHODS[1], marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_no_record_and_goes_on_to_the_same_end(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn, cell = settings(folder, methods=(method,), seeds=(0,), runs=tmp_path), Cell(method, 3, 0)
    played = callbacks.TensorBoard.played

    def stop(self: callbacks.TensorBoard, episode: Any, **options: Any) -> None:
        played(self, episode, **options)
        if episode.number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TensorBoard, "played", stop)
        with pytest.raises(KeyboardInterrupt):
            search_table.main(torn)
    assert search_table.recorded(torn) == []
    assert (torn.folder(cell) / torn.config(cell).name).is_dir()
    search_table.main(torn)
    (record,) = search_table.recorded(torn)
    whole = search_table.known(settings(folder), cell)
    assert {**record, "seconds": 0} == {**whole, "seconds": 0}


def test_each_kind_of_run_has_its_command_and_is_resumed_by_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []
    for program in (search_baselines, train):
        name = program.__name__.removeprefix("agents.")
        monkeypatch.setattr(program, "main", lambda words, name=name: calls.append((name, words)) or INTERRUPTED)
    wanted = settings(folder, runs=tmp_path, refit="none", importance="l2", evaluations=(8,), seeds=(5,))
    for cell, program, names in (
        (Cell("random_search", 8, 5), "search_baselines", ("--method", "--evaluations")),
        (Cell("amc", 8, 5), "train", ("--algorithm", "--episodes")),
    ):
        config, where = wanted.config(cell), wanted.folder(cell)
        assert where == tmp_path / "evaluations8-refit-none"
        with pytest.raises(KeyboardInterrupt):
            search_table.made(wanted, cell)
        said, words = calls.pop()
        assert said == program
        assert words[-2:] == ["--runs", str(where)]
        given = dict(zip(words[1:-2:2], words[2:-2:2], strict=True))
        assert [given[name] for name in names] == [cell.method, "8"]
        assert (given["--refit"], given["--importance"], given["--seed"]) == ("none", "l2", "5")
        RunFolder.create(where / config.name, config)
        with pytest.raises(KeyboardInterrupt):
            search_table.made(wanted, cell)
        assert calls.pop() == (program, ["--resume", str(where / config.name)])
    assert search_table.recorded(wanted) == []


def test_a_run_that_fails_is_no_record(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = settings(folder, weights=str(folder / "absent.safetensors"), runs=tmp_path)
    with pytest.raises(ValueError, match="ended with exit code 2"):
        search_table.main(wanted)
    assert search_table.recorded(wanted) == []


def test_a_search_that_ends_early_says_what_it_spent(folder: Path, tmp_path: Path) -> None:
    whole = settings(folder, budget=1.0, methods=("random_search",), seeds=(0,), runs=tmp_path)
    record = search_table.made(whole, Cell("random_search", 3, 0))
    assert (record["evaluations"], record["spent"]) == (3, 1)  # all shares, scaled up to the whole, are one plan
    assert "| random_search | 3 (spent 1) |" in search_table.table([record])


def test_what_no_run_would_take_is_refused_before_the_first(folder: Path) -> None:
    with pytest.raises(ValueError, match="method 'random_serch' is unknown; did you mean 'random_search'"):
        settings(folder, methods=("cem", "random_serch"))
    with pytest.raises(ValueError, match="against 'random_serch' is unknown; did you mean 'random_search'"):
        settings(folder, against="random_serch")
    with pytest.raises(ValueError, match="method 'uniform' is unknown"):
        settings(folder, methods=("uniform",))
    with pytest.raises(ValueError, match="against 'error_curve' is unknown; did you mean 'error_curves'"):
        settings(folder, against="error_curve")
    with pytest.raises(ValueError, match="importance 'l11' is unknown; did you mean 'l1'"):
        settings(folder, importance="l11")
    with pytest.raises(ValueError, match="episodes is 0"):
        settings(folder, evaluations=(100, 0))


def test_records_and_runs_with_other_settings_are_refused(folder: Path, run_no_more: None, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=r"has weights dense\.safetensors, not other\.safetensors"):
        search_table.main(settings(folder, weights=str(other)))
    with pytest.raises(ValueError, match=r"holds a run with weights .*dense\.safetensors, not .*other\.safetensors"):
        search_table.main(settings(folder, weights=str(other), records=tmp_path))
    file = settings(folder, records=tmp_path).record(Cell("random_search", 3, 0))
    file.write_text('{"task": ')
    with pytest.raises(ValueError, match="is corrupt"):
        search_table.main(settings(folder, records=tmp_path))


def test_a_cell_that_is_asked_for_twice_counts_once(folder: Path) -> None:
    twice = settings(folder, seeds=(0, 1, 0), evaluations=(4, 3, 4), methods=("cem",))
    assert twice.cells == [Cell("cem", n, seed) for n in (3, 4) for seed in (0, 1)]


def test_seconds_are_those_of_the_evaluations_in_all_logs_of_a_run(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for number, times in enumerate([(2000.0, 3000.0), (4000.0,), ()]):
        log = SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=f".{number}")
        (file,) = (tmp_path / "tensorboard").glob(f"*.{number}")
        begin = file.stat().st_mtime
        for step, seconds in enumerate(times):
            log.add_scalar("search/accuracy", 0.5, step, walltime=begin + seconds)
        log.add_scalar("final/learned_test_accuracy", 0.5, 0, walltime=begin + 5000)
        log.close()
    assert search_table.search_seconds(tmp_path) == pytest.approx(7000, abs=100)  # however busy the machine is
    assert search_table.search_seconds(tmp_path / "none") == 0


def test_quantiles_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(intervals.QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), abs=5.1e-4)


def test_the_interval_by_hand() -> None:
    # mean 2, deviation 1, t of 2 degrees of freedom 4.303
    assert intervals.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert intervals.interval([1.0, 2.0, 3.0]) == "-0.48 to 4.48, n = 3"
    # mean 5, deviation sqrt(2), t of 1 degree of freedom 12.706
    assert intervals.half_width([4.0, 6.0]) == pytest.approx(12.706)
    assert intervals.interval([4.0, 6.0], form="+.1f") == "-7.7 to +17.7, n = 2"
    assert intervals.half_width([5.0]) is None
    assert intervals.interval([5.0]) == "n = 1"
    many = [0.0, 2.0] * 20
    assert intervals.half_width(many) == pytest.approx(2.042 * math.sqrt(40 / 39) / math.sqrt(40))


def row(test: float, *, search: float = 0.9, macs: float = 0.5) -> dict[str, Any]:
    return {"search_accuracy": search, "test_accuracy": test, "macs_share": macs, "params_share": 0.6}


def record(method: str, seed: int, found: float, *, evaluations: int = 100, **changes: Any) -> dict[str, Any]:
    rows = {"dense": row(0.92, macs=1.0), "uniform": row(0.70 + 0.02 * seed), "found": row(found, search=found + 0.1)}
    rows["found"]["source"] = changes.pop("source", method)
    usual = {"method": method, "seed": seed, "evaluations": evaluations, "spent": evaluations, "own": {}, "seconds": 60}
    return {**usual, "rows": rows | changes.pop("rows", {}), **changes}


HAND = [
    record("random_search", 1, 0.76, source="uniform"),
    record("random_search", 0, 0.74, seconds=61),
    # limits of its own may move its uniform plan: the table's is that of the others
    record("amc", 0, 0.75, own={"min_keep": 0.2}, rows={"uniform": row(0.1), "policy": row(0.71)}),
    record("amc", 1, 0.79, own={"min_keep": 0.2}, rows={"uniform": row(0.1), "policy": row(0.73)}),
    record("cem", 1, 0.80, evaluations=400, spent=399),
]


def test_the_table_by_hand() -> None:
    assert search_table.table(HAND).splitlines()[2:] == [
        "| dense |  | 90.00 | 92.00 | 92.00 to 92.00, n = 2 | +21.00 | 1.000 |  |  |  |  | 92.00, 92.00 |",
        "| uniform |  | 90.00 | 71.00 | 58.29 to 83.71, n = 2 |  | 0.500 |  |  |  |  | 70.00, 72.00 |",
        "| random_search | 100 | 85.00 | 75.00 | 62.29 to 87.71, n = 2 | +4.00 | 0.500 |  | 60.5 |  "
        "| random_search, uniform | 74.00, 76.00 |",
        "| amc | 100 | 87.00 | 77.00 | 51.59 to 102.41, n = 2 | +6.00 | 0.500 | 72.00 | 60.0 | min_keep 0.2 "
        "| amc | 75.00, 79.00 |",
        "| cem | 400 (spent 399) | 90.00 | 80.00 | n = 1 | +8.00 | 0.500 |  | 60.0 |  | cem | 80.00 |",
    ]
    assert len({line.count("|") for line in search_table.table(HAND).splitlines()}) == 1
    assert len(search_table.table([]).splitlines()) == 2


def test_rows_without_evaluations_by_hand() -> None:
    # records of before the row do without; +2 and +0 points against it at 100 evaluations, +4 at 400
    curves = {"rows": {"error_curves": row(0.76)}}
    records = [*HAND, record("td3", 1, 0.78, **curves), record("td3", 0, 0.74, rows={"error_curves": row(0.74)})]
    lines = search_table.table(records).splitlines()
    assert lines[4] == (
        "| error_curves |  | 90.00 | 75.00 | 62.29 to 87.71, n = 2 | +4.00 | 0.500 |  |  |  |  | 74.00, 76.00 |"
    )
    lines = search_table.paired_table(records, "error_curves").splitlines()
    assert lines[4] == "| td3 | 100 | -4.00 | +1.00 | -11.71 to +13.71, n = 2 | +0.00, +2.00 |"
    assert lines[5] == "| cem | 400 | +0.00 | +4.00 | n = 1 | +4.00 |"


def test_paired_differences_by_hand() -> None:
    # +1 and +3 points: mean 2, deviation sqrt(2), half width 12.706
    lines = search_table.paired_table(HAND, "random_search").splitlines()
    assert lines[2:] == ["| amc | 100 | +2.00 | +2.00 | -10.71 to +14.71, n = 2 | +1.00, +3.00 |"]
    # pairs are of one seed and one number of evaluations
    more = [*HAND, record("random_search", 1, 0.77, evaluations=400), record("cem", 0, 0.9, evaluations=400)]
    lines = search_table.paired_table(more, "random_search").splitlines()
    assert lines[3:] == ["| cem | 400 | +3.00 | +3.00 | n = 1 | +3.00 |"]
    # against another method
    lines = search_table.paired_table(HAND, "amc").splitlines()
    assert lines[2:] == ["| random_search | 100 | -2.00 | -2.00 | -14.71 to +10.71, n = 2 | -1.00, -3.00 |"]
