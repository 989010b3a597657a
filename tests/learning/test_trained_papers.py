"""The table and the pictures of papers that train: equal epochs, what is reused, what goes on, what is said."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from agents.cli import guarded
from benchmarks import paper_pictures, trained_cells, trained_papers
from benchmarks.trained_cells import preparing
from benchmarks.trained_papers import OWN, Cell, Settings, against_uniform, recorded, report, verdicts
from prune_env.pruning.archive import load
from prune_env.pruning.measure import count_macs
from prune_env.pruning.plan import Plan

ROWS = ("uniform", "polarization", "scop", "grda", "sgd", "channel_gating")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the cells that the table made."""
    folder = tmp_path_factory.mktemp("papers")
    assert trained_papers.main(table(folder)) == 0
    return folder


@pytest.fixture
def trained_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is reused."""
    for name in ("cut_cell", "sparse_cell", "gated_cell"):
        monkeypatch.setattr(trained_papers, name, lambda *args: pytest.fail("made again"))


def table(runs: Path, **changes: object) -> Settings:
    usual = Settings(dense_epochs=0, epochs=2, rows=ROWS, targets=(1.0,), runs=runs)
    return dataclasses.replace(usual, **changes)


def of(runs: Path, row: str, aim: str = "0.5") -> dict:
    (found,) = [one for one in recorded(table(runs)) if (one["row"], one["aim"]) == (row, aim)]
    return found


@pytest.mark.slow
def test_every_row_has_the_same_epochs_and_uniform_spends_them_on_fine_tuning(runs: Path) -> None:
    cuts = [one for one in recorded(table(runs)) if one["row"] in trained_cells.CUTS]
    assert {one["prepare_epochs"] + one["fine_tune_epochs"] for one in cuts} == {2}
    assert {one["prepare_epochs"] for one in cuts if one["row"] == "uniform"} == {0}
    assert {one["prepare_epochs"] for one in cuts if one["row"] != "uniform"} == {1}
    assert len(of(runs, "grda", "")["by_epoch"]) == of(runs, "grda", "")["epochs"] == 2
    assert len({one["dense"]["test"] for one in recorded(table(runs))}) == 1


def test_the_published_share_of_the_epochs_prepares() -> None:
    found = {row: preparing(row, 12) for row in ("uniform", "polarization", "slimming", "scop", "directional_pruning")}
    assert found == {"uniform": 0, "polarization": 6, "slimming": 6, "scop": 2, "directional_pruning": 6}
    assert (preparing("scop", 2), preparing("scop", 70)) == (1, 10)
    searching = trained_cells.CUTS["polarization_half"].method(6).prepare
    assert searching.keywords == {"budget": 0.5, "epochs": 6}


@pytest.mark.slow
def test_budgets_hold_and_uniform_meets_what_a_method_found(runs: Path) -> None:
    for row in ("uniform", "polarization", "scop"):
        assert of(runs, row)["macs_share"] <= 0.5
    met = of(runs, "uniform", "polarization")["macs_share"]
    assert met <= of(runs, "polarization", OWN)["macs_share"] < met + 0.05


@pytest.mark.slow
def test_a_cells_folder_holds_the_plan_and_the_network_that_were_measured(runs: Path) -> None:
    cell, bench = Cell("scop", "0.5", 0), table(runs).bench(0)
    folder, record = table(runs).folder(cell), of(runs, "scop")
    network = load(folder / "network")
    dense = count_macs(bench.task.network, bench.task.example)
    assert count_macs(network, bench.task.example) / dense == record["macs_share"]
    assert trained_cells.accuracies(network, bench.task) == record["fine_tuned"]
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert {name: len(plan.keep[name]) for name in record["counts"]} == record["counts"]
    assert sorted(path.name for path in folder.iterdir()) == ["network", "plan.json"]


@pytest.mark.slow
def test_what_is_recorded_is_not_made_again(
    runs: Path, trained_no_more: None, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_papers.main(table(runs))
    whole = capsys.readouterr().out
    assert whole.count("| scop |") == 1
    trained_papers.main(table(runs, only_print=True, seeds=(0, 7)))
    assert capsys.readouterr().out == whole
    assert str(runs) not in json.dumps(recorded(table(runs)))


@pytest.mark.slow
@pytest.mark.parametrize("row", ["polarization", "grda"])
def test_a_killed_cell_goes_on_to_the_same_record(row: str, runs: Path, tmp_path: Path) -> None:
    aim = OWN if row == "polarization" else ""
    settings, cell, told = table(tmp_path), Cell(row, aim, 0), []

    def kill(done: int, total: int, what: str) -> None:
        told.append(what)
        if len(told) == 28:  # of 17 steps an epoch: in the second training, or in the second epoch of the only one
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_papers.made(settings, cell, lambda seed: settings.bench(seed, kill))
    assert not settings.record(cell).exists()
    again = trained_papers.made(settings, cell, cache(settings.bench))
    assert again == of(runs, row, aim)


@pytest.mark.slow
def test_a_record_of_other_settings_is_refused(runs: Path) -> None:
    file = table(runs).record(Cell("sgd", "", 0))
    whole = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(whole), "weights": "other.safetensors"}))
        with pytest.raises(ValueError, match=r"has weights other.safetensors, not None; choose another folder"):
            recorded(table(runs))
        file.write_text(whole[:50])
        with pytest.raises(ValueError, match="is corrupt"):
            recorded(table(runs))
    finally:
        file.write_text(whole)


def made_up(row: str, aim: str, seed: int, tuned: float, macs: float = 0.5) -> dict:
    stages = {name: {"search": 0.5, "test": 0.9} for name in ("dense", "prepared", "cut")}
    sizes = {"macs_share": macs, "params_share": macs, "prepare_epochs": 6, "fine_tune_epochs": 6, "epochs": 12}
    return {"row": row, "aim": aim, "seed": seed, **sizes, **stages, "fine_tuned": {"search": 0.5, "test": tuned}}


def test_a_row_is_compared_with_uniform_of_the_same_seed_at_the_same_macs() -> None:
    uniform = [made_up("uniform", "0.5", seed, 0.88 + seed / 100) for seed in (0, 1, 2)]
    worse = [made_up("scop", "0.5", seed, 0.87 + 2 * seed / 100) for seed in (0, 1, 2)]
    own = [made_up("polarization", OWN, 0, 0.9, 0.3), made_up("uniform", "polarization", 0, 0.89, 0.29)]
    far = [made_up("polarization", "0.5", 0, 0.9, 0.3)]
    found = against_uniform([*uniform, *worse, *own, *far])
    assert found.keys() == {("scop", "0.5"), ("polarization", OWN)}
    np.testing.assert_allclose(found["scop", "0.5"], [-1.0, 0.0, 1.0], atol=1e-9)
    losing = [made_up("scop", "0.5", seed, 0.87 + seed / 100) for seed in (0, 1, 2)]
    assert verdicts([*uniform, *losing]) == ["scop (0.5 of the macs) loses to uniform l1 by 1.00 points, 3 seeds."]
    text = report(Settings(), [*uniform, *losing])
    # Losses are 1 in each seed: the interval of the mean has no width.
    assert "-1.00 (-1.00 to -1.00, n = 3)" in text
    assert "87.00, 88.00, 89.00" in text
    assert "dense 90.00 %" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("polarisation",)}, "did you mean 'polarization'"),
        ({"epochs": 1}, "epochs is 1"),
        ({"budgets": (1.5,)}, "budget is 1.5"),
        ({"seeds": (-1,)}, "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    changes: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: trained_papers.main(table(tmp_path, **changes))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- pictures --------------------------------------------------------------------------------------------------------


def title(figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_the_pictures_say_what_their_data_say() -> None:
    polar = np.array([0.0, 0.01, 0.02, 0.1, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0])
    scales = {"dense": np.full(10, 0.9), "slimming": np.linspace(0.06, 0.6, 10), "polarization": polar}
    # Of L1's, .06, .12 and .18 lie in the valley from .05 to .2.
    drawn = paper_pictures.scales_figure("a task", scales)
    assert title(drawn).endswith(
        "30% of the scales near 0 and 10% in the valley under polarization, 0% and 30% under L1"
    )
    betas = {"kept": np.array([0.9, 0.8, 0.7]), "cut": np.array([0.6, 0.2])}
    assert "80% of 5 channels prefer their real" in title(paper_pictures.betas_figure("a task", "0.5", betas))
    assert "of those that are cut, 50% do" in title(paper_pictures.betas_figure("a task", "0.5", betas))
    epochs = [{"epoch": 1, "search": 0.8, "sparsity": 0.1}, {"epoch": 2, "search": 0.82, "sparsity": 0.25}]
    grda = {"dense": {"search": 0.9}, "by_epoch": epochs}
    sgd = {"dense": {"search": 0.9}, "by_epoch": [{**one, "sparsity": 0.0, "search": 0.83} for one in epochs]}
    assert "25% of the parameters are zero after 2 epochs" in title(paper_pictures.sparsity_figure("a task", grda, sgd))
    assert "-1.00 points against SGD" in title(paper_pictures.sparsity_figure("a task", grda, sgd))


@pytest.mark.slow
def test_pictures_are_drawn_from_the_cells(runs: Path, trained_no_more: None, tmp_path: Path) -> None:
    settings = paper_pictures.PictureSettings(
        **vars(table(runs)), pictures=("betas", "sparsity", "gates"), out=tmp_path
    )
    assert paper_pictures.main(settings) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "papers_betas.png", "papers_gates.png", "papers_sparsity.png"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="did you mean 'gates'"):
        dataclasses.replace(settings, pictures=("gate",))


@pytest.mark.slow
def test_where_gates_open_is_a_share_of_the_channels_at_each_position(runs: Path) -> None:
    bench = table(runs).bench(0)
    settings = trained_cells.channel_gating.scaled(bench.task, target=1.0, epochs=2, seed=0)
    gated = trained_cells.channel_gating.prepared(bench.task, settings)
    images = bench.task.test.take(3)[0]
    with gated.at(-np.inf):
        assert all((own == 1).all() for own in paper_pictures.open_maps(gated, images).values())
    maps = paper_pictures.open_maps(gated, images)
    assert list(maps) == [gated.names[0], gated.names[len(gated.names) // 2], gated.names[-1]]
    assert all(own.shape[0] == 3 and 0 <= own.min() <= own.max() <= 1 for own in maps.values())
