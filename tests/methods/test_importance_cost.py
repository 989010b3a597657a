"""What importances cost: which are measured, on how many images, how often, and whose memory is counted."""

from __future__ import annotations

import dataclasses
import json
import mmap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from baselines import METHODS, provable_filter_pruning
from benchmarks import importance_cost
from benchmarks.importance_cost import CRITERIA, Settings, Subject, measured, read, store
from prune_env.pruning.importance import IMPORTANCES, score
from prune_env.pruning.sensitivity import sample_size
from prune_env.pruning.tracing import trace
from prune_env.tasks.task import Task, make_task

IMAGES = 200
COST = {"seconds": 12.34, "cpu_seconds": 0.25, "mib": 1.26}


@pytest.fixture(scope="module")
def task() -> Task:
    """Weights and statistics that no seed gives, so that a subject with them must have read them."""
    made = make_task("digits-cnn", epochs=0)
    with torch.no_grad():
        for tensor in made.network.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3))
    return made


@pytest.fixture(scope="module")
def folder(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("subject")
    store(task, IMAGES, made)
    return made


@pytest.fixture
def subject(folder: Path) -> Subject:
    return read(folder, network="cnn", classes=10)


def row(folder: Path, criterion: str, *, repeats: int = 1) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        return measured(folder, network="cnn", classes=10, criterion=criterion, repeats=repeats, threads=1)
    finally:
        torch.set_num_threads(threads)


def test_all_importances_and_all_scores_that_methods_bring_are_measured() -> None:
    assert set(IMPORTANCES) < set(CRITERIA)
    own = set(CRITERIA) - set(IMPORTANCES)
    assert {"provable_filter_pruning", "provable_filter_pruning_random", "merge_cost"} <= own <= set(METHODS)
    assert not own & {"uniform", "cem", "neuron_merging", "lamp", "polarization", "scop"}
    assert len(set(CRITERIA)) == len(CRITERIA)


@pytest.mark.parametrize("criterion", ["l1", "second_order", "provable_filter_pruning"])
def test_what_is_timed_is_the_score_of_the_tasks_network(criterion: str, task: Task, subject: Subject) -> None:
    batch = task.calibration(IMAGES)
    wanted = score(criterion.replace("provable_filter_pruning", "pfp"), task.network, trace_of(task), batch)
    found = importance_cost.scoring(criterion, subject)()
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(np.asarray(found[name]), values.numpy(), rtol=1e-6)


def trace_of(task: Task) -> Any:
    return trace(task.network, task.example)


def test_images_are_those_that_run_through_the_network(folder: Path, subject: Subject) -> None:
    sample = sample_size(subject.network, subject.images[:1])
    wanted = {"l1": 0, "merge_cost": 0, "hrank": 50, "taylor": IMAGES, "provable_filter_pruning": sample + 1}
    assert 50 < sample < IMAGES
    assert {name: row(folder, name)["images"] for name in wanted} == wanted
    assert row(folder, "hrank", repeats=3)["images"] == 50


def test_sensitivities_are_not_remembered_between_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = provable_filter_pruning.sensitivities, []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return found(*arguments, **options)

    monkeypatch.setattr(provable_filter_pruning, "sensitivities", watched)
    monkeypatch.setattr(importance_cost, "LONG", float("inf"))  # however busy the machine is
    assert row(folder, "provable_filter_pruning", repeats=2)["calls"] == len(calls) == 2


def test_seconds_are_a_median_and_long_calls_are_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*seconds: float) -> dict[str, Any]:
        times = iter([(second, second / 2) for second in seconds])
        monkeypatch.setattr(importance_cost, "timed", lambda call: next(times))
        return row(folder, "l1", repeats=3)

    usual, long = clock(9.0, 1.0, 2.0), clock(10.5)
    assert (usual["seconds"], usual["cpu_seconds"], usual["calls"]) == (2.0, 1.0, 3)
    assert (long["seconds"], long["cpu_seconds"], long["calls"]) == (10.5, 5.25, 1)


def test_a_process_that_waits_computes_nothing() -> None:
    seconds, cpu_seconds = importance_cost.timed(lambda: time.sleep(0.2))
    assert seconds >= 0.2 > 2 * cpu_seconds


@pytest.mark.skipif(not importance_cost.RESET.exists(), reason="needs Linux's /proc")
def test_memory_is_what_a_call_takes_beyond_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(mib: int) -> None:
        # Not from the heap: what an earlier test freed there may still be resident.
        area = np.frombuffer(mmap.mmap(-1, mib << 20), dtype=np.uint8)
        area[:] = 1

    take(200)  # and gone again: of no concern to what follows
    monkeypatch.setattr(importance_cost, "scoring", lambda criterion, subject: lambda: take(100))
    assert row(folder, "l1")["mib"] == pytest.approx(100, abs=5)
    monkeypatch.setattr(importance_cost, "STATUS", folder / "absent")
    assert row(folder, "l1")["mib"] is None


@pytest.mark.slow
def test_a_criterion_runs_in_a_fresh_process_and_the_file_says_what_is_printed(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("scored here")

    monkeypatch.setattr(importance_cost, "score", never)
    weights = tmp_path / "dense.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in task.network.state_dict().items()}, weights)
    out = tmp_path / "new" / "cost.json"
    usual = Settings(task="digits-cnn", weights=str(weights), criteria=("l1",), images=60, repeats=2, out=out)
    importance_cost.main(usual)
    record = json.loads(out.read_text())
    (found,) = record.pop("rows")
    assert record == {"task": "digits-cnn", "weights": "dense.safetensors", "images": 60, "threads": 1}
    assert (found["network"], found["criterion"], found["images"], found["calls"]) == ("cnn", "l1", 0, 2)
    assert found["seconds"] > 0
    assert found["mib"] is None or 0 <= found["mib"] < 50
    assert str(tmp_path) not in out.read_text()
    title, head, _, last = [text for text in capsys.readouterr().out.splitlines() if text]
    assert title == "cnn, 60 images of digits, threads: 1"
    assert last == importance_cost.line(found)
    assert last.count("|") == head.count("|")


def test_each_network_has_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def alone(folder: Path, task: Task, criterion: str, settings: Settings) -> dict[str, Any]:
        subject = read(folder, network=task.network_name, classes=10)
        assert (subject.name, len(subject.images)) == (task.network_name, 20)
        return {"network": task.network_name, "criterion": criterion, "images": 7, **COST}

    monkeypatch.setattr(importance_cost, "alone", alone)
    networks = ("cnn", "lenet300100")
    importance_cost.main(Settings(task="digits-cnn", networks=networks, criteria=("l1", "obd"), images=20))
    lines = [text for text in capsys.readouterr().out.splitlines() if text]
    titles = [f"{name}, 20 images of digits, threads: 1" for name in networks]
    assert [text for text in lines if "digits" in text] == titles
    rows = ["| l1 | 7 | 12.3 | 0.250 | 1.3 |", "| obd | 7 | 12.3 | 0.250 | 1.3 |"]
    assert [text for text in lines if "0.250" in text] == rows * 2
    unknown = {"criterion": "l1", "images": 0, **COST, "mib": None}
    assert importance_cost.line(unknown) == "| l1 | 0 | 12.3 | 0.250 | - |"


def test_given_weights_are_those_that_are_measured(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen = tmp_path / "dense.safetensors", []
    save_file({name: tensor.contiguous() for name, tensor in task.network.state_dict().items()}, weights)

    def alone(folder: Path, task: Task, criterion: str, settings: Settings) -> dict[str, Any]:
        seen.append(read(folder, network=task.network_name, classes=10).network.state_dict())
        return {"network": task.network_name, "criterion": criterion, "images": 0, **COST}

    monkeypatch.setattr(importance_cost, "alone", alone)
    importance_cost.main(Settings(task="digits-cnn", weights=str(weights), criteria=("l1",), images=4))
    for name, tensor in task.network.state_dict().items():
        assert torch.equal(seen[0][name], tensor), name


def test_bad_input_is_refused() -> None:
    usual = Settings(task="digits-cnn")
    with pytest.raises(ValueError, match="criterion 'tailor' is unknown; did you mean 'taylor'"):
        dataclasses.replace(usual, criteria=("l1", "tailor"))
    with pytest.raises(ValueError, match="not of vgg16_bn"):
        dataclasses.replace(usual, weights="dense.safetensors", networks=("vgg16_bn",))
    with pytest.raises(ValueError, match="repeats is 0"):
        dataclasses.replace(usual, repeats=0)
