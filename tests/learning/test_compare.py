"""Comparisons: cells are measured once, whoever else works in the folder, and nothing is lost when somebody dies."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents import compare, comparison_cell, comparison_executor
from agents.comparison import DEMONSTRATION, Cell, Comparison
from agents.comparison_executor import RETRIES, Processes, run_cells
from agents.comparison_methods import DENSE, KINDS, kind_of
from agents.comparison_store import DEAD_S, Record, Store, read_record
from baselines import METHODS
from tests.learning.comparison_records import record

# later versions of Python warn of forks beside threads; here they are quick, and carry the patches of a test along
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SMALL = Comparison(methods=("uniform", "lamp", "cem"), seeds=(0, 1), epochs=0)
SICK = Cell("digits-cnn", "lamp", 0.5, 1)


class Here:
    """Measures cells in this process, one at a time."""

    slots = 1

    def __init__(self, folder: Path) -> None:
        self.folder, self.over = folder, []

    def start(self, cell: Cell) -> None:
        comparison_cell.work_on(self.folder, cell)
        self.over.append((cell, ""))

    def ended(self) -> list[tuple[Cell, str]]:
        over, self.over = self.over, []
        return over

    def stop(self) -> None:
        pass


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """Cells are not really measured, but counted, in whatever process."""
    log = tmp_path / "measured.txt"

    def measured(comparison: Comparison, cell: Cell, folder: Path, **_: Any) -> Record:
        with log.open("a") as file:
            file.write(f"{cell.name}\n")
        return {name: value for name, value in record(cell.method, 0.5, seed=cell.seed).items() if name != "cell"}

    monkeypatch.setattr(comparison_cell, "measured", measured)
    return lambda: Counter(log.read_text().split() if log.exists() else [])


def names(comparison: Comparison = SMALL) -> list[str]:
    return [cell.name for cell in comparison.cells]


def run(store: Store, executor: Any = None, **options: Any) -> None:
    run_cells(store, SMALL.cells, executor or Here(store.path), pause_s=0.01, **options)


def test_cells_come_seed_by_seed_each_once_and_dense_first() -> None:
    twice = dataclasses.replace(SMALL, methods=("uniform", "lamp", "uniform"), seeds=(1, 0, 1), budgets=(0.5, 0.3))
    listed = [(cell.seed, cell.method, cell.budget) for cell in twice.cells]
    block = [("dense", 1.0), ("uniform", 0.5), ("lamp", 0.5), ("uniform", 0.3), ("lamp", 0.3)]
    assert listed == [(seed, *rest) for seed in (1, 0) for rest in block]
    assert len(set(names(twice))) == 10


def test_every_method_has_one_kind_and_groups_stand_for_kinds() -> None:
    known = [name for found in KINDS.values() for name in found]
    assert len(known) == len(set(known))
    assert set(METHODS) <= set(known)
    assert kind_of("cem") == "search"
    assert kind_of("neuron_merging") == "paper"
    words = Comparison(methods=("learned", "learned:amc", "searches", "fbs", "cem", "td3"))
    assert words.methods == ("td3", "amc", *KINDS["search"], "fbs")


def test_a_comparison_is_json_and_back() -> None:
    assert Comparison.from_json(DEMONSTRATION.to_json()) == DEMONSTRATION
    kinds = {kind_of(method) for method in DEMONSTRATION.methods}
    assert kinds == {"heuristic", "paper", "search", "learned"}
    with pytest.raises(ValueError, match="field 'evaluatons' is unknown; did you mean 'evaluations'"):
        Comparison.from_json('{"evaluatons": 3}')


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "unifrom"], "method 'unifrom' is unknown; did you mean 'uniform'"),
        (["--methods", "learned:td4"], "did you mean 'learned:td3'"),
        (["--methods", "learned:cem"], "method 'learned:cem' is unknown"),
        (["--tasks", "digits-cn"], "did you mean 'cnn'"),
        (["--importance", "taylr"], "did you mean 'taylor'"),
        (["--budgets", "0.5", "0"], "budget is 0"),
        (["--budgets", "0.5", "0.0001"], "smallest share allowed"),
        (["--methods", "uniform@taylr"], "importance 'taylr' is unknown; did you mean 'taylor'"),
        (["--methods", "unifrm@l2"], "method 'unifrm' is unknown; did you mean 'uniform'"),
        (["--methods", "polarization@l2"], "'polarization' takes no importance"),
        (["--methods", "fbs@l2"], "'fbs' takes no importance"),
        (["--methods", "heuristics@l2"], "'heuristics' takes no importance"),
        (["--evaluations", "0"], "episodes is 0"),
        (["--reward", "short-trainin"], "did you mean 'short-training'"),
        (["--reward", "short-training", "--short-steps", "0"], "short_steps is 0"),
        (["--reward", "predicted"], "predictor"),
        (["--reward", "predicted", "--predictor", "absent.json"], "absent.json"),
        (["--seeds", "-1"], "seed"),
        (["--executor", "rai"], "did you mean 'ray'"),
        (["--workers", "0"], "workers is 0"),
        (["--weights", "digits-cnn=absent.safetensors"], "weights 'absent.safetensors' is no file"),
        (["--weights", "cifar10-resnet20=x"], "TASK=FILE"),
        (["--methods", "fbs", "--budget-resource", "params"], "fbs is held to macs only"),
        (["--report-only", "nowhere"], "no results folder"),
        (["--resume", "nowhere"], "no results folder"),
        (["--verify", "nowhere/cells/x.json"], "is missing"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_leaves_nothing(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main([*words, "--runs", "runs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"executor 'ray' needs Ray.*prune-env\[ray\]"):
        comparison_executor.RayTasks(tmp_path, 1)


def test_a_finished_cell_is_never_measured_again(tmp_path: Path, counted: Callable[[], Counter[str]]) -> None:
    store, seen = Store.create(tmp_path / "runs", SMALL), []
    run(store)
    run(store, finished=seen.append)
    assert counted() == Counter(names())
    assert seen == SMALL.cells
    assert [one["cell"] for one in store.records()] == [dataclasses.asdict(cell) for cell in SMALL.cells]
    assert not list((store.path / "cells").glob("*.claim"))


def test_cells_may_be_added_to_a_folder(tmp_path: Path, counted: Callable[[], Counter[str]]) -> None:
    store = Store.create(tmp_path / "runs", SMALL)
    run(store)
    more = dataclasses.replace(SMALL, seeds=(2,))
    assert Store.create(tmp_path / "runs", more).comparison == dataclasses.replace(SMALL, seeds=(0, 1, 2))
    run_cells(store, more.cells, Here(store.path), pause_s=0.01)
    assert counted() == Counter([*names(), *names(more)])
    assert len(store.records()) == 12


def test_two_processes_share_a_folder(tmp_path: Path, counted: Callable[[], Counter[str]]) -> None:
    store, context = Store.create(tmp_path / "runs", SMALL), multiprocessing.get_context("fork")
    others = [context.Process(target=run, args=(store,)) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    assert counted() == Counter(names())
    assert len(store.records()) == len(names())


def test_a_killed_comparison_goes_on(
    tmp_path: Path, counted: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, quick = Store.create(tmp_path / "runs", SMALL), comparison_cell.measured
    held = tmp_path / "held"

    def slow(comparison: Comparison, cell: Cell, folder: Path, **_: Any) -> Record:
        if cell == SMALL.cells[3]:
            folder.mkdir(parents=True)
            (folder / "checkpoint").write_text("half")
            held.touch()
            time.sleep(60)
        return quick(comparison, cell, folder)

    with monkeypatch.context() as patch:
        patch.setattr(comparison_cell, "measured", slow)
        process = multiprocessing.get_context("fork").Process(target=run, args=(store,))
        process.start()
        while not held.exists():
            time.sleep(0.01)
        assert store.held(SMALL.cells[3])
        process.kill()
        process.join()
    assert len(store.records()) == 3
    assert (store.work(SMALL.cells[3]) / "checkpoint").exists()  # what there is to go on from
    run(store)
    assert counted() == Counter(names())
    assert not any((store.path / "work").iterdir())
    assert not list((store.path / "cells").glob("*.claim"))


def test_a_killed_worker_is_replaced_and_one_that_always_dies_is_a_failed_row(
    tmp_path: Path, counted: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, quick, deaths = Store.create(tmp_path / "runs", SMALL), comparison_cell.measured, tmp_path / "deaths"
    once = SMALL.cells[1]

    def deadly(comparison: Comparison, cell: Cell, folder: Path, **_: Any) -> Record:
        if cell == SICK or (cell == once and not deaths.exists()):
            with deaths.open("a") as file:
                file.write(f"{cell.name}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return quick(comparison, cell, folder)

    monkeypatch.setattr(comparison_cell, "measured", deadly)
    run(store, Processes(store.path, 2, method="fork"))
    dead = Counter(deaths.read_text().split())
    assert dead == {once.name: 1, SICK.name: RETRIES + 1}
    records = {one["cell"]["method"] + str(one["cell"]["seed"]): one for one in store.records()}
    assert len(records) == len(names())
    assert records["lamp1"]["failed"] == f"its process was killed by SIGKILL, {RETRIES + 1} times"
    assert [name for name, one in records.items() if "failed" in one] == ["lamp1"]


def test_an_interrupted_comparison_gives_its_cells_back(
    tmp_path: Path, counted: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, quick = Store.create(tmp_path / "runs", SMALL), comparison_cell.measured

    def slow(comparison: Comparison, cell: Cell, folder: Path, **_: Any) -> Record:
        if cell.seed == 1:
            time.sleep(60)
        return quick(comparison, cell, folder)

    def stop(running: Any) -> None:
        if len(running) == 2 and all(cell.seed == 1 and store.held(cell) for cell in running):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison_cell, "measured", slow)
        with pytest.raises(KeyboardInterrupt):
            run(store, Processes(store.path, 2, method="fork"), under_way=stop)
    assert not any(map(store.held, SMALL.cells))
    assert len(store.records()) == 4
    run(store)
    assert counted() == Counter(names())


def test_a_cell_that_fails_is_a_row_with_its_reason_until_it_is_tried_again(
    tmp_path: Path, counted: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, quick = Store.create(tmp_path / "runs", SMALL), comparison_cell.measured

    def ill(comparison: Comparison, cell: Cell, folder: Path, **_: Any) -> Record:
        if cell == SICK:
            raise RuntimeError("no such layer\nat all")
        return quick(comparison, cell, folder)

    with monkeypatch.context() as patch:
        patch.setattr(comparison_cell, "measured", ill)
        run(store)
    failed = store.record(SICK)
    assert failed is not None
    assert failed["failed"] == "RuntimeError: no such layer at all"
    assert "Traceback" in store.log(SICK).read_text()
    assert len(store.records()) == len(names())
    run(store)
    assert counted()[SICK.name] == 0
    store.forget(SICK)
    run(store)
    assert counted()[SICK.name] == 1


@pytest.mark.parametrize("damage", ["changed", "torn", "other", "no object"])
def test_a_record_that_was_touched_is_named(
    damage: str, tmp_path: Path, counted: Callable[[], Counter[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.create(tmp_path / "runs", SMALL)
    run(store)
    file = store.path / "cells" / f"{SICK.name}.json"
    text = file.read_text()
    other = (store.path / "cells" / f"{SMALL.cells[0].name}.json").read_text()
    changed = {
        "changed": text.replace('"test_accuracy": 0.5', '"test_accuracy": 0.9'),
        "torn": text[:-40],
        "other": other,
        "no object": "[]",
    }[damage]
    assert changed != text
    file.write_text(changed)
    for words in (["--resume", str(store.path)], ["--report-only", str(store.path)]):
        assert compare.main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert SICK.name in error
        assert "delete it" in error


def test_the_folder_of_another_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store.create(tmp_path / "runs", SMALL)
    before = (tmp_path / "runs" / "config.json").read_text()
    assert compare.main(["--epochs", "0", "--evaluations", "7", "--runs", str(tmp_path / "runs")]) == 2
    assert "holds a comparison with evaluations 100, not 7; name another --runs" in capsys.readouterr().err
    assert (tmp_path / "runs" / "config.json").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(ValueError, match="is not empty and no results folder"):
        Store.create(tmp_path / "mine", SMALL)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "runs" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is corrupt"):
        Store.create(tmp_path / "runs", SMALL)


def test_other_weights_make_another_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "copy"):
        (tmp_path / f"{name}.safetensors").write_text("a" if name == "copy" else name)
    files = [f"digits-cnn={tmp_path}/{name}.safetensors" for name in ("a", "b", "copy")]
    a, b, copy = (dataclasses.replace(SMALL, weights=(file,)) for file in files)
    Store.create(tmp_path / "runs", a)
    Store.create(tmp_path / "runs", copy)  # what is in the file counts, not where it is
    with pytest.raises(ValueError, match="holds a comparison with weights of digits-cnn"):
        Store.create(tmp_path / "runs", b)
    with pytest.raises(ValueError, match="holds a comparison with other weights of digits-cnn"):
        Store.create(tmp_path / "runs", SMALL)
    monkeypatch.setenv("PRUNE_ENV_WEIGHTS", str(tmp_path))
    named = dataclasses.replace(SMALL, weights=("digits-cnn=a.safetensors",))
    assert named.protocol == a.protocol
    assert str(tmp_path) not in json.dumps(named.protocol)
    monkeypatch.delenv("PRUNE_ENV_WEIGHTS")
    (tmp_path / "a.safetensors").unlink()
    Store.open(tmp_path / "runs").records()  # a report needs no weights


def claim(store: Store, cell: Cell, **changes: Any) -> Path:
    """A claim of this process, but for the changes."""
    file = store.path / "cells" / f"{cell.name}.claim"
    with store.claimed(cell):
        content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))
    return file


def test_whose_process_lives_holds_its_cell(tmp_path: Path) -> None:
    store, cell = Store.create(tmp_path / "runs", SMALL), SMALL.cells[0]

    def taken() -> bool:
        with store.claimed(cell) as ours:
            return not ours

    assert not taken()
    claim(store, cell)
    assert store.held(cell)
    assert taken()
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    claim(store, cell, pid=process.pid)
    assert not taken()
    claim(store, cell, started="0")  # the number is another process's now
    assert not taken()
    file = claim(store, cell, host="elsewhere", pid=1)
    assert taken()
    old = time.time() - DEAD_S - 1
    os.utime(file, (old, old))
    assert not taken()
    claim(store, cell).write_text("")
    assert not taken()
    assert socket.gethostname() != "elsewhere"


def test_a_claim_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, cell = Store.create(tmp_path / "runs", SMALL), SMALL.cells[0]
    monkeypatch.setattr("agents.comparison_store.TOUCH_S", 0.01)
    file = store.path / "cells" / f"{cell.name}.claim"
    with store.claimed(cell):
        os.utime(file, (1, 1))
        until = time.time() + 10
        while file.stat().st_mtime < 2 and time.time() < until:
            time.sleep(0.01)
        assert file.stat().st_mtime > 2
    assert not file.exists()
    assert threading.active_count() < 20


def test_the_record_is_read_as_it_was_written(tmp_path: Path, counted: Callable[[], Counter[str]]) -> None:
    store = Store.create(tmp_path / "runs", SMALL)
    run(store)
    file = store.path / "cells" / f"{SICK.name}.json"
    assert read_record(file) == store.record(SICK)
    assert read_record(file)["measured"] == record("lamp", 0.5)["measured"]


def test_time_left_by_hand() -> None:
    cells = [Cell("digits-cnn", method, 0.5, 0) for method in ("cem", "cem", "lamp")]
    # 2 x 100 s of cem and 1 x 60 s, the mean of the two methods known, by 2 workers
    assert compare.time_left({"cem": [90.0, 110.0], "uniform": [20.0]}, cells, 2) == "about 2 min left"
    assert compare.time_left({"cem": [7200.0]}, cells, 1) == "about 6 h 0 min left"
    assert compare.time_left({}, cells, 1) == "time left unknown"
    assert compare.time_left({DENSE: [6.0]}, cells, 1) == "time left unknown", "that cell only measures"
    assert compare.time_left({DENSE: [6.0], "cem": [7200.0]}, cells, 1) == "about 6 h 0 min left"
    assert compare.time_left({DENSE: [60.0]}, [Cell("digits-cnn", DENSE, 1.0, 1)], 1) == "about 1 min left"
    assert compare.time_left({DENSE: [6.0]}, [], 1) == "done"
