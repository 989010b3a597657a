"""The curve of Provable Filter Pruning: a row a file, made once, whoever made it; what is refused; its picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from benchmarks import pfp_curve
from benchmarks.pfp_curve import Settings
from prune_env.tasks.networks import make_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the weights are, and the rows that were measured."""
    made = tmp_path_factory.mktemp("curve")
    tensors = make_network("cnn", classes=10, channels=1, side=8, seed=0).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / "dense.safetensors")
    pfp_curve.main(settings(made))
    return made


def settings(folder: Path, **changes: Any) -> Settings:
    usual = Settings(
        weights=str(folder / "dense.safetensors"), out=folder / "rows", budgets=(0.6, 0.4), methods=("uniform", "pfp"),
        fine_tune_epochs=1, picture=folder / "curve.png",
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


@pytest.mark.slow
def test_a_row_is_a_file(folder: Path) -> None:
    rows = pfp_curve.rows_of(settings(folder))
    keys = [(row["resource"], row["budget"], row["method"]) for row in rows]
    assert keys == list(itertools.product(("macs", "params"), (0.6, 0.4), ("uniform", "pfp")))
    for row in rows:
        assert row["budget"] - 0.05 < row[row["resource"]] <= row["budget"]
        assert 0 <= row["fine_tuned_test_accuracy"] <= 1
    assert json.loads((folder / "rows" / "macs0.6-pfp.json").read_text())["weights"] == "dense.safetensors"
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_only_what_is_missing_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the weights lie somewhere else."""
    monkeypatch.setattr(pfp_curve, "make_task", lambda *_, **__: pytest.fail("measured again"))
    moved = tmp_path / "dense.safetensors"
    moved.write_bytes((folder / "dense.safetensors").read_bytes())
    pfp_curve.main(settings(folder, weights=str(moved)))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        pfp_curve.main(settings(folder, budgets=(0.6, 0.5)))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"fine_tune_epochs": 2}, {"seed": 1}, {"weights": "other.safetensors"}])
def test_rows_of_other_conditions_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"has {next(iter(changes))} .*choose another folder"):
        pfp_curve.main(settings(folder, **changes))


@pytest.mark.slow
def test_nothing_is_printed_of_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no row"):
        pfp_curve.main(settings(folder, out=tmp_path, only_print=True))
