"""The study as a whole, on digits: its splits, its records, what goes on after a stop, and what processes share."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.lasting import plans, predictors, report, scores, truth
from benchmarks.lasting.__main__ import Arguments, main
from benchmarks.lasting.candidates import tables
from benchmarks.lasting.ranking import ridge
from benchmarks.lasting.short import Short
from benchmarks.lasting.study import Job, Record, Settings, Study, make_all, read, save
from prune_env.config import make_problem
from prune_env.envs.predictor import Predictor
from prune_env.pruning.plan import Plan
from prune_env.tasks.training import train

TINY = Settings(
    task="digits-cnn", epochs=1, search_size=100, truth_size=200, budgets=(0.5,), evaluations=5, fine_tune_epochs=2
)
PLANS = ("uniform-l1-none", "uniform-second_order-refit", "lean+0.33")
SHORTS = ("2@.02", "4@.02")
HOLD = """import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)"""


def words(folder: Path, *more: str) -> list[str]:
    fields = {name: value for name, value in dataclasses.asdict(TINY).items() if name != "budgets"}
    said = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    options = ["--budgets", ".5", "--plans", *PLANS, "--short", *SHORTS, "--again", "2", "--out", str(folder)]
    return [*said, *options, *more]


def silent(done: int, total: int, what: str) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that one command made."""
    made = tmp_path_factory.mktemp("lasting")
    assert main(words(made, "--stage", "plans", "truth", "scores")) == 0
    return made


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return Study(TINY, folder)


def test_the_truth_is_held_out_of_everything_else(study: Study) -> None:
    train_images, search, held_out = (
        set(split.indices.tolist()) for split in (study.task.train, study.task.search, study.truth)
    )
    assert (len(search), len(held_out)) == (100, 200)
    assert len(train_images) + len(search) + len(held_out) == len(train_images | search | held_out)
    assert len(train_images | search | held_out) == len(study.task.train.images)
    # Calibration and short trainings read the training split, searches the search split of the same problem.
    assert len(study.problem("l1", "none").evaluator.meter) == 100
    assert study.task.test.images is not study.truth.images


def test_the_dense_network_lies_with_the_records(study: Study, tmp_path: Path) -> None:
    (tmp_path / "dense.safetensors").write_bytes((study.folder / "dense.safetensors").read_bytes())
    # With more epochs it would be another network, if one were trained.
    again = Study(dataclasses.replace(TINY, epochs=2), tmp_path)
    for name, tensor in study.task.network.state_dict().items():
        assert torch.equal(again.task.network.state_dict()[name], tensor), name
    for split in ("train", "search"):
        assert torch.equal(getattr(again.task, split).indices, getattr(study.task, split).indices)


def test_every_plan_keeps_its_budget_and_names_its_score_and_repair(study: Study) -> None:
    made = study.plans()
    assert [plan["name"] for plan in made] == sorted(f"0.5-{name}" for name in PLANS)
    assert all(0.4 < plan["macs"] <= 0.5 for plan in made)
    assert {(plan["importance"], plan["repair"]) for plan in made} == {("l1", "none"), ("second_order", "refit")}


def test_a_study_has_forty_plans_and_half_of_them_at_every_other_budget(study: Study) -> None:
    recipes = plans.recipes(evaluations=7)
    assert len({one.name for one in recipes}) == len(recipes) == 40
    assert sum(one.core for one in recipes) == 20
    assert {one.allocate.evaluations for one in recipes if one.name.startswith("cem")} == {7}
    both = Study(dataclasses.replace(TINY, budgets=(0.5, 0.35)), study.folder)
    assert len(plans.jobs(both)) == 60
    assert both.plans() == study.plans(), "a study may grow by budgets"


def test_late_plans_keep_more_of_late_groups(study: Study) -> None:
    case = plans.case_of(plans.METHODS["uniform"], study.problem("l1", "none", 0.5))
    early, uniform, late, bent = (
        plans.leaning(case, **options) / case.choices.full
        for options in ({"slope": -1.0}, {}, {"slope": 1.0}, {"bend": 1.0})
    )
    assert late[-1] > uniform[-1] > early[-1]
    assert late[0] < uniform[0] < early[0]
    assert bent[0] > uniform[0]
    assert not np.array_equal(plans.leaning(case, spread=0.5), plans.leaning(case, spread=0.5, draw=1))
    assert np.array_equal(plans.leaning(case, spread=0.5), plans.leaning(case, spread=0.5))


def test_a_fine_tuning_is_the_same_for_everybody_and_differs_by_its_seed(study: Study) -> None:
    plan, other = (study.plans()[i] for i in (0, 1))
    again = truth.fine_tuned(study, plan, 0)
    first, second = (read(study.path("truth", f"{plan['name']}-seed{seed}")) for seed in (0, 1))
    clocks = ("cpu_s", "wall_s")
    assert {k: v for k, v in again.items() if k not in clocks} == {k: v for k, v in first.items() if k not in clocks}
    assert first["truth_loss"] != second["truth_loss"]
    assert not study.path("truth", f"{other['name']}-seed1").exists(), "one plan of two has a second seed"
    # 1797 images: 1437 to train on and to hold out of, batches of 64, two epochs.
    assert first["steps"] == 2 * (len(study.task.train) // 64)


def test_a_fine_tuning_that_was_stopped_goes_on(study: Study, tmp_path: Path) -> None:
    plan = study.plans()[0]
    whole = read(study.path("truth", f"{plan['name']}-seed0"))

    def stop(done: int, total: int, note: str) -> None:
        if done > total // 2 + 1:
            raise KeyboardInterrupt

    stopped = Study(TINY, tmp_path, stop)
    stopped.path("truth", "").parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        truth.fine_tuned(stopped, plan, 0)
    assert not list(tmp_path.glob("truth/*.json"))
    epochs: list[int] = []

    def see(done: int, total: int, note: str) -> None:
        epochs.append(int(note.split()[1].split("/")[0]))

    resumed = truth.fine_tuned(Study(TINY, tmp_path, see), plan, 0)
    assert set(epochs) == {2}, "only the second epoch was left"
    assert resumed["truth_accuracy"] == whole["truth_accuracy"]
    assert resumed["train_losses"] == whole["train_losses"]
    assert not list(tmp_path.glob("truth/.*.safetensors"))


def test_a_finished_study_is_only_read(folder: Path, study: Study, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*-*.json")}

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("made again")

    for module, name in ((plans, "made"), (truth, "fine_tuned"), (scores, "trained"), (scores, "quality")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(report, "png", lambda figure: b"")
    assert main(words(folder)) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*-*.json")} == before
    said = capsys.readouterr().out
    assert "tau-b" in said
    assert f"--predictor {folder / 'predictors' / 'refit.json'}" in said
    # what was learned from records pays an episode as those records would have been paid
    for repair, refit in predictors.REPAIRS.items():
        file = str(folder / "predictors" / f"{repair}.json")
        known = Predictor.read(file)
        problem = make_problem(study.task, reward="predicted", predictor=file, refit=refit)
        own = ("digits-cnn", refit, 3, problem.channels)
        assert (known.task, known.refit, known.plans, known.channels) == own
        plan = study.plans()[0]
        families = read(study.path("scores", plan["name"]))["families"]
        values = families["widths"]["values"] | families[repair]["values"]
        foretold = known.accuracy([values[name] for name in known.features])
        assert problem.evaluator.measure(Plan(plan["keep"])).accuracy == pytest.approx(foretold, abs=1e-4)


def test_scores_are_filled_up_by_what_is_missing(study: Study) -> None:
    name = study.plans()[0]["name"]
    file = study.path("scores", name)
    before = read(file)["families"]
    assert {"2@0.02", "4@0.02", "2 of 4@0.02", "widths", "cut", "recalibrated", "refit", "zen"} <= before.keys()
    make_all(scores.jobs(study, (*map(Short.parse, SHORTS), Short(3, 0.01)))[:1], told=silent)
    after = read(file)["families"]
    assert after.keys() - before.keys() == {"3@0.01", "2 of 3@0.01"}
    assert {key: after[key] for key in before} == before


def test_a_prefix_is_the_training_up_to_there_and_costs_less_than_the_whole(study: Study) -> None:
    plan = study.plans()[0]
    families = read(study.path("scores", plan["name"]))["families"]
    prefix, whole, own = (families[name] for name in ("2 of 4@0.02", "4@0.02", "2@0.02"))
    assert 0 < prefix["cpu_s"] < whole["cpu_s"]
    assert prefix["values"] != whole["values"]
    assert prefix["values"] != own["values"], "its learning rate is still high"
    assert set(whole["values"]) == {"accuracy", "neg_loss", "margin"}


def test_a_folder_of_other_settings_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, "--fine-tune-lr", ".5")) == 2
    error = capsys.readouterr().err
    assert "fine_tune_lr 0.05, not 0.5; choose another folder" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--short", "20", "short is '20'"),
        ("--truth-size", "1", "truth_size is 1"),
        ("--again", "-1", "again is -1"),
        ("--plans", "lean+0.34", "plan 'lean+0.34' is unknown; did you mean 'lean+0.33'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path, option, value)) == 2
    assert said in capsys.readouterr().err


def test_the_defaults_are_the_real_study() -> None:
    usual = Arguments()
    assert (usual.task, usual.budgets, usual.fine_tune_epochs, usual.fine_tune_lr) == (
        "cifar10-resnet20", (0.5, 0.35), 3, 0.05,
    )  # fmt: skip
    assert {Short.parse(text).steps for text in usual.short} == {20, 50, 100, 300}


# What processes share


def jobs(folder: Path, made: list[str]) -> list[Job]:
    def job(name: str) -> Job:
        file = folder / f"{name}.json"

        def make() -> None:
            made.append(name)
            save(file, {})

        return Job(file, file.exists, make)

    return [job(name) for name in ("a", "b", "c")]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is making record `a`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".a.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_what_another_process_makes_is_left_to_it_and_taken_over_when_it_dies(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    made: list[str] = []

    def told(done: int, total: int, what: str) -> None:
        # All others are made: this is the second round, which waits for the holder.
        if what == "a" and done == 2:
            holder.kill()

    make_all(jobs(tmp_path, made), told=told)
    assert made == ["b", "c", "a"]


def test_two_at_once_make_every_record_once(tmp_path: Path) -> None:
    made: list[str] = []
    both = [threading.Thread(target=lambda: make_all(jobs(tmp_path, made), told=silent)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(made) == ["a", "b", "c"]


# The report, from records made up for it


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    """Five plans whose fine-tuning the short training foresees and the instant measurement gets the wrong way round."""
    values = {"a": 0.90, "b": 0.91, "c": 0.92, "d": 0.93, "uniform-l1-none": 0.94}
    for rank, (name, accuracy) in enumerate(values.items()):
        plan = f"0.5-{name}"
        save(tmp_path / "plans" / f"{plan}.json", {"name": plan, "budget": 0.5})
        for seed, moved in ((0, 0.0), (1, 0.002)):
            own = {"plan": plan, "seed": seed, "steps": 1000, "truth_accuracy": accuracy + moved, "test_accuracy": 0.9}
            save(tmp_path / "truth" / f"{plan}-seed{seed}.json", own)
        save(tmp_path / "scores" / f"{plan}.json", {"plan": plan, "families": families(rank)})
    return tmp_path


def families(rank: int) -> Record:
    def entry(seconds: float, **values: float) -> Record:
        return {"cpu_s": seconds, "wall_s": 2 * seconds, "values": values}

    return {
        "cut": entry(1.0, accuracy=-rank),
        "20@0.02": entry(4.0, accuracy=0.5 + rank / 100),
        "50@0.02": entry(8.0, accuracy=0.6 + rank / 100),
        "synflow": entry(1.0, score=float("inf") if rank == 2 else 0.0),
    }


def test_candidates_are_what_all_plans_have_with_their_cost(invented: Path) -> None:
    (table,) = tables(invented, TINY)
    found = {one.name: one for one in table.candidates}
    assert "synflow score" not in found, "it is not finite for all plans"
    assert found["20@0.02 accuracy"].kind == "short training"
    assert (found["cut accuracy"].cpu_s, found["cut accuracy"].wall_s) == (1.0, 2.0)
    grown = found["20+50@0.02 promise"]
    assert (grown.cpu_s, grown.families) == (12.0, ("20@0.02", "50@0.02"))
    assert table.truth == pytest.approx([0.901, 0.911, 0.921, 0.931, 0.941])


def test_a_plan_whose_scores_are_under_way_does_not_take_those_of_the_others(invented: Path) -> None:
    file = invented / "scores" / "0.5-b.json"
    save(file, {"plan": "0.5-b", "families": {"cut": families(1)["cut"]}})
    (table,) = tables(invented, TINY)
    assert table.plans == ("0.5-a", "0.5-c", "0.5-d", "0.5-uniform-l1-none")
    assert "20@0.02 accuracy" in {one.name for one in table.candidates}
    assert table.spread.plans == 5, "its truth is known"


def test_the_report_says_what_there_is_to_win_and_who_sees_it(invented: Path) -> None:
    text = report.write_report(invented, TINY)
    # Seeds differ by .002, so one fine-tuning is .0014 from its plan's mean; plans deviate by .0158.
    assert "5 plans lie between 90.00 and 94.00 %, with a standard deviation of 1.58 points" in text
    assert "Another seed moves a plan by 0.14 points (5 plans with two seeds)" in text
    assert "Plans differ 11.2 times as much as seeds: there is something to win." in text
    own, together = text.split("### All budgets")
    assert "`20@0.02 accuracy` above `cut accuracy`, on the same plans: 2.00 [" in together
    rows = {line.split(" | ")[0].strip("| *"): line.split(" | ") for line in own.splitlines() if line.startswith("| ")}
    assert rows["20@0.02 accuracy"][3].startswith("1.00")
    assert rows["20@0.02 accuracy"][4].startswith("0.00")
    assert rows["cut accuracy"][3].startswith("-1.00")
    assert rows["cut accuracy"][4].startswith("4.00"), "the best by this score is the worst plan"
    assert "uniform l1 90.00 %. There, plans have a standard deviation of 0.00 points, and another seed" in text
    assert "Uniform l1 has 94.10 %: 0 of the other 4 plans are above it. By luck" in text
    # The expected largest of five draws is 1.163 deviations (Blom's formula: 1.180) of .0014 above the mean.
    assert "the highest of 5 equal plans would lie 0.17 points above their mean" in text
    assert (invented / "report.md").read_text() == text
    assert (invented / "lasting.png").read_bytes().startswith(b"\x89PNG")
    lines = (invented / "scores.csv").read_text().splitlines()
    assert lines[1].startswith("0.5,20@0.02 accuracy,short training,4,8,1.0000,")


def test_little_spread_is_called_by_its_name(invented: Path) -> None:
    for file in (invented / "truth").glob("*seed1.json"):
        record = json.loads(file.read_text())
        save(file, {**record, "truth_accuracy": record["truth_accuracy"] + 0.02})
    assert "there is hardly more to win than the noise" in report.to_win(tables(invented, TINY)[0].spread)


def test_what_is_above_uniform_is_counted(invented: Path) -> None:
    for file in (invented / "truth").glob("0.5-uniform*.json"):
        record = json.loads(file.read_text())
        save(file, {**record, "truth_accuracy": record["truth_accuracy"] - 0.025})
    text = report.over_uniform(tables(invented, TINY)[0])
    assert "Uniform l1 has 91.60 %: 2 of the other 4 plans are above it, the highest by 1.50 points." in text


def test_a_predictor_is_the_line_through_its_plans(invented: Path) -> None:
    names = [f"widths {name}" for name in predictors.FEATURES[:3]] + ["refit neg_loss"]
    for rank, file in enumerate(sorted((invented / "scores").glob("*.json"))):
        slope = {"log_widths": float(rank), "log_params": float(rank % 2), "tilt": 1.0}
        found = {"widths": slope, "refit": {"neg_loss": -float(rank * rank)}}
        entries = {name: {"cpu_s": 1.0, "wall_s": 1.0, "values": values} for name, values in found.items()}
        save(file, {"plan": file.stem, "families": entries})
    made = predictors.fitted(tables(invented, TINY), names, task="t", channels=(4,), refit="moments")
    (table,) = tables(invented, TINY)
    columns = np.stack([{one.name: one.values for one in table.candidates}[name] for name in names], axis=1)
    foretold = [made.accuracy(row.tolist()) for row in columns]
    assert foretold == pytest.approx(ridge(columns, table.truth)(columns))
    assert (made.plans, made.refit, made.weights[2]) == (5, "moments", pytest.approx(0))


def test_without_records_the_report_says_what_to_do_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run these stages first"):
        report.write_report(tmp_path, TINY)


def test_the_network_of_a_plan_can_be_trained(study: Study) -> None:
    """Cut networks come without gradients; the truth would otherwise be that of no training at all."""
    network = study.realised(study.plans()[0])
    before = network.linear.weight.detach().clone()
    train(network, study.task.train.at(torch.arange(64)), settings=study.training(epochs=1, lr=0.1))
    assert not torch.equal(network.linear.weight, before)
