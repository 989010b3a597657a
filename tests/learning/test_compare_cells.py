"""Cells of a comparison, really measured: what a record says, that it can be repeated, and that it can be resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from agents import compare, comparison_cell
from agents.comparison import Cell, Comparison
from agents.comparison_cell import DONE, TAKEN, work_on
from agents.comparison_executor import RayTasks, run_cells
from agents.comparison_report import write_report
from agents.comparison_store import Record, Store, digest
from agents.comparison_summary import summaries
from agents.comparison_tables import csv_text, markdown
from agents.runtime_agent import PpoSettings
from agents.runtime_options import SCHEDULES, Schedule
from baselines import prune

ROOT = Path(__file__).parents[2]
TINY = Comparison(
    methods=("uniform", "neuron_merging", "cem", "learned"),
    budgets=(0.4,),
    seeds=(0,),
    evaluations=3,
    fine_tune_epochs=1,
    calibration_images=64,
    epochs=0,
)
CLOCKS = ("seconds", "cpu_seconds", "latency")


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished comparison of each kind of static row."""
    made = Store.create(tmp_path_factory.mktemp("compare") / "runs", TINY)
    assert [work_on(made.path, cell) for cell in TINY.cells] == [DONE] * 5
    return made


def of(store: Store, method: str) -> Record:
    record = store.record(next(cell for cell in TINY.cells if cell.method == method))
    assert record is not None
    assert "failed" not in record, record
    return record


def test_every_row_keeps_the_budget_and_says_what_it_spent(store: Store) -> None:
    spent = {"uniform": 0, "neuron_merging": 0, "cem": 3, "td3": 3}
    for method, evaluations in spent.items():
        record = of(store, method)
        assert record["facts"]["evaluations"] == evaluations
        assert record["facts"]["epochs"] == 1
        assert record["measured"]["macs"] <= 0.4 * record["dense"]["macs"]
        assert set(record["measured"]) == set(of(store, "cem")["measured"])
        assert 0 <= record["measured"]["fine_tuned_test_accuracy"] <= 1
        assert all(1 <= kept <= channels for kept, channels in record["kept"].values())
        assert record["protocol"] == TINY.protocol
        assert record["latency"]["pruned_s"] > 0
        assert record["cpu_seconds"]["find"] > 0
    assert [of(store, method)["facts"]["repair"] for method in spent] == ["auto", "own", "auto", "auto"]
    assert of(store, "dense")["measured"]["macs"] == of(store, "dense")["dense"]["macs"]
    assert not any((store.path / "work").iterdir())
    assert work_on(store.path, TINY.cells[0]) == TAKEN


def test_a_row_is_what_the_method_gives_by_itself(store: Store) -> None:
    record = of(store, "neuron_merging")
    result = prune("neuron_merging", TINY.task(TINY.cells[1]), budget=0.4, calibration_images=64)
    assert record["measured"]["test_accuracy"] == result.test.accuracy
    assert record["measured"]["search_accuracy"] == result.search.accuracy
    assert {group: kept for group, (kept, _) in record["kept"].items()} == dict(result.counts)
    # searches and agents begin with the uniform plan: what they choose is no worse on the search split
    uniform = of(store, "uniform")["measured"]["search_accuracy"]
    assert all(of(store, method)["measured"]["search_accuracy"] >= uniform for method in ("cem", "td3"))


@pytest.mark.slow
def test_agents_and_searches_are_paid_by_the_comparison_s_reward(store: Store, tmp_path: Path) -> None:
    lasting = dataclasses.replace(TINY, methods=("uniform", "cem", "td3"), reward="short-training", short_steps=2)
    with pytest.raises(ValueError, match="reward"):
        Store.create(store.path, lasting)
    made = Store.create(tmp_path / "runs", lasting)
    assert [work_on(made.path, cell) for cell in lasting.cells] == [DONE] * 4
    records = {cell.method: made.record(cell) or {} for cell in lasting.cells}
    for method in ("cem", "td3"):
        assert records[method]["facts"]["paid_by"] == "short-training, 2 steps, lr 0.02"
        assert records[method]["facts"]["own"] == of(store, method)["facts"]["own"]
    assert "paid_by" not in records["uniform"]["facts"]
    assert records["uniform"]["measured"] == of(store, "uniform")["measured"]
    csv, table = (form(list(records.values())) for form in (csv_text, lambda some: markdown(summaries(some))))
    assert csv.count('"short-training, 2 steps, lr 0.02"') == 2
    assert "| paid by |" in table
    assert "paid by" not in markdown(summaries([of(store, "uniform")]))


@pytest.mark.slow
def test_a_method_may_have_an_importance_of_its_own(store: Store, tmp_path: Path) -> None:
    names = ("uniform", "uniform@l1", "uniform@taylor", "cem@l2", "learned:td3@tp_magnitude")
    mixed = dataclasses.replace(TINY, methods=names, fine_tune_epochs=0)
    assert mixed.methods == (*names[:4], "td3@tp_magnitude")
    assert Comparison.from_json(mixed.to_json()) == mixed
    made = Store.create(tmp_path / "runs", mixed)
    assert [work_on(made.path, cell) for cell in mixed.cells] == [DONE] * 6
    records = {cell.method: made.record(cell) or {} for cell in mixed.cells}
    used = {name: record["facts"]["importance"] for name, record in records.items()}
    assert used == {
        "dense": "",
        "uniform": "l1",
        "uniform@l1": "l1",
        "uniform@taylor": "taylor",
        "cem@l2": "l2",
        "td3@tp_magnitude": "tp_magnitude",
    }
    assert [records[name]["kind"] for name in names[:4]] == ["heuristic", "heuristic", "heuristic", "search"]
    assert records["uniform@l1"]["plan"] == records["uniform"]["plan"]
    by_itself = prune("uniform", TINY.task(TINY.cells[1]), budget=0.4, importance="taylor", calibration_images=64)
    assert records["uniform@taylor"]["measured"]["test_accuracy"] == by_itself.test.accuracy
    assert "uniform@taylor" in csv_text(list(records.values()))


@pytest.mark.slow
def test_a_sample_of_rows_repeats_in_a_fresh_process(store: Store) -> None:
    files = [str(store.path / "cells" / f"{cell.name}.json") for cell in TINY.cells]
    sample = [files[1], files[3], files[4]]  # uniform, cem, td3
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "agents.compare", "--verify", *sample]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the record agrees") == 3


def test_a_forged_record_with_a_digest_of_its_own_does_not_agree(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, cell = Store.create(tmp_path / "runs", TINY), TINY.cells[1]
    record = of(store, "uniform")
    record["measured"]["test_accuracy"] += 0.01
    file = made.path / "cells" / f"{cell.name}.json"
    file.write_text(json.dumps({"digest": digest(record), **record}))
    assert made.record(cell) is not None
    assert compare.main(["--verify", str(file)]) == 1
    assert "the record does not agree: test_accuracy is" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", [pytest.param("cem", marks=pytest.mark.slow), "td3"])
def test_a_cell_that_was_interrupted_goes_on_to_the_same_end(
    method: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn, cell = Store.create(tmp_path / "runs", TINY), Cell("digits-cnn", method, 0.4, 0)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison_cell, "after_fine_tuning", stop)
        with pytest.raises(KeyboardInterrupt):
            work_on(torn.path, cell)
    assert (torn.work(cell) / "run" / "episodes.csv").exists()
    assert not torn.held(cell)
    assert work_on(torn.path, cell) == DONE
    again, whole = torn.record(cell), of(store, method)
    assert again is not None
    assert again["cpu_seconds"] is None  # the clock saw only the last part
    assert {**again, **dict.fromkeys(CLOCKS)} == {**whole, **dict.fromkeys(CLOCKS)}


def test_a_budget_that_one_method_cannot_reach_is_its_failed_row(tmp_path: Path) -> None:
    # amc keeps a fifth of each group at least
    hard = dataclasses.replace(TINY, methods=("amc",), budgets=(0.02,), fine_tune_epochs=0)
    hard.check_reachable()
    store = Store.create(tmp_path / "runs", hard)
    work_on(store.path, hard.cells[1])
    (record,) = store.records()
    assert "cannot be reached" in record["failed"]
    write_report(store)
    assert "cannot be reached" in (store.path / "results.csv").read_text()


SHORT = Schedule(gates=1, scores=1, rounds=1, rollouts=2, network=1, final=1, ppo=PpoSettings(epochs=1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["runtime", "runtime_both", "runtime_static", "fbs", "static_uniform"])
def test_runtime_rows_have_mean_macs_in_columns_of_their_own(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "digits", SHORT)
    wanted = dataclasses.replace(TINY, methods=(method,), budgets=(0.6,))
    store, cell = Store.create(tmp_path / "runs", wanted), wanted.cells[1]
    assert work_on(store.path, cell) == DONE, store.log(cell).read_text()
    record = store.record(cell)
    assert record is not None
    measured = record["measured"]
    assert "macs" not in measured
    assert measured["dynamic_macs_share_5"] <= measured["dynamic_macs"] / record["dense"]["macs"]
    assert record["facts"]["own_training"] == "4 epochs, network and gates"
    assert record["latency"]["pruned_s"] > 0
    again = comparison_cell.measured(wanted, cell, tmp_path / "again")
    assert again["measured"] == measured
    write_report(store)


def signalled(words: Sequence[str], folder: Path, number: signal.Signals) -> int:
    """Exit code of a comparison that is sent a signal once some cells are there."""
    with subprocess.Popen(
        [sys.executable, "-m", "agents.compare", *words], cwd=ROOT, start_new_session=True
    ) as process:
        while len(list(folder.glob("cells/*.json"))) < 2:
            time.sleep(0.1)
            assert process.poll() is None
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
    return process.returncode


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_comparison_goes_on_after_ctrl_c_and_after_a_kill_and_ends_with_a_report(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ["--methods", "uniform", "error_curves", "cem", "learned", "--budgets", "0.4", "--seeds", "0", "1"]
    words += ["--evaluations", "8", "--epochs", "1", "--workers", "2"]
    assert signalled([*words, "--runs", str(runs)], runs, signal.SIGINT) == 130
    assert not list(runs.glob("cells/*.claim"))
    first = {file.name: file.read_bytes() for file in runs.glob("cells/*.json")}
    assert signalled(["--resume", str(runs)], runs, signal.SIGKILL) == -signal.SIGKILL
    done = subprocess.run([sys.executable, "-m", "agents.compare", "--resume", str(runs)], cwd=ROOT, check=False)
    assert done.returncode == 0
    store = Store.open(runs)
    assert len(store.records()) == len(store.comparison.cells) == 10
    assert not any("failed" in record for record in store.records())
    assert all((runs / "cells" / name).read_bytes() == content for name, content in first.items())
    for file in ("report.html", "results.csv", "results.md"):
        assert (runs / file).stat().st_size > 500


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # Ray's own, which differ from version to version
def test_nothing_is_lost_when_a_ray_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    wanted = dataclasses.replace(TINY, methods=("uniform", "lamp"), seeds=(0, 1))
    store, killed = Store.create(tmp_path / "runs", wanted), []

    def kill_one(running: Sequence[Cell]) -> None:
        claims = list(store.path.glob("cells/*.claim"))
        if not killed and claims and len(running) == 2:
            killed.append(json.loads(claims[0].read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)

    run_cells(store, wanted.cells, RayTasks(store.path, 2), under_way=kill_one)
    assert len(killed) == 1
    assert len(store.records()) == len(wanted.cells) == 6
    assert not any("failed" in record for record in store.records())
