"""The papers that train before they prune, on one dense network and with the same epochs, beside uniform l1.

    python -m benchmarks.trained_papers --task cifar10-resnet20 --weights FILE.safetensors --epochs 12 --seeds 0 1 2 \
        --runs DIR

Every cell has the same dense network and the same epochs in all: what prepares is taken from what fine-tunes
(`benchmarks.trained_cells`), and uniform l1 fine-tunes for all of them. A method that decides by itself how much goes
has a row of its own without a budget, and uniform l1 one at the macs that it found. Nothing is chosen by the test
split: the last epoch counts. Hyper-parameters are the published ones, scaled to the epochs by the rule of each method.

Unstructured pruning and dynamic macs have tables of their own. What was interrupted goes on after the last whole
epoch; what is recorded is not made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from agents.cli import guarded, parse, stages
from agents.intervals import interval
from benchmarks.cells import line, read
from benchmarks.trained_cells import (
    CUTS,
    GATED,
    SPARSE,
    Bench,
    Record,
    bench,
    cut_cell,
    gated_cell,
    sparse_cell,
)
from prune_env.checks import check_name
from prune_env.files import write

OWN = "own ratios"
"""Aim of a cell whose method decides how much goes."""

NEAR = 0.02
"""Share of the macs by which two rows that are compared may differ."""

CUT_HEADS = (
    "method", "aim", "macs", "params", "epochs, prepare + fine-tune", "test accuracy after prepare, %", "after cut",
    "after fine-tuning", "against dense", "95 % of its mean", "against uniform at these macs", "by seed", "published",
)  # fmt: skip
SPARSE_HEADS = ("optimiser", "epochs", "zeros, %", "test accuracy, %", "against dense", "by seed", "published")
GATED_HEADS = (
    "target threshold", "epochs", "dynamic macs, mean over images", "5-95 % of images", "params", "test accuracy, %",
    "against dense", "by seed", "published",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One network of a table.

    Attributes:
        row: Which method.
        aim: A budget, `OWN`, the method whose macs are met, or a target threshold; empty where there is none.
        seed: Of splits and trainings.
    """

    row: str
    aim: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """The table of papers that train.

    Raises:
        ValueError: An unknown row (names the closest), or a number that is not allowed.
    """

    task: str = "digits-cnn"
    """Task name."""
    weights: str | None = None
    """File with the dense weights; without it the network is trained, or loaded from the cache."""
    dense_epochs: int | None = None
    """Epochs of the dense training; the task's own by default."""
    epochs: int = 12
    """Epochs of every cell in all, preparation and fine-tuning together."""
    rows: tuple[str, ...] = (
        "uniform", "polarization", "slimming", "scop", "directional_pruning", "grda", "sgd", "channel_gating",
    )  # fmt: skip
    """Rows to make, of those of `trained_cells`."""
    budgets: tuple[float, ...] = (0.5,)
    """Shares of the macs."""
    own: bool = True
    """Also what methods keep that decide by themselves, and uniform at their macs."""
    targets: tuple[float, ...] = (1.0, 2.0)
    """Target thresholds of channel gating."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of splits and trainings."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs/trained_papers")
    """Folder of trained networks and of the cells'."""
    records: Path | None = None
    """Folder of the finished cells, one small JSON file each; `records` in the folder of the runs by default."""
    only_print: bool = False
    """Print the cells that are recorded, and make none."""

    def __post_init__(self) -> None:
        for row in self.rows:
            check_name("row", row, (*CUTS, *SPARSE, *GATED))
        if self.epochs < 2:
            raise ValueError(f"epochs is {self.epochs}; 2 or more are allowed, one to prepare and one to fine-tune")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"budget is {budget}; a share of the macs in (0, 1] is allowed")
        for seed in self.seeds:
            if seed < 0:
                raise ValueError(f"seed is {seed}; 0 or more is allowed")

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once, seed by seed; what a method decides by itself first, for others follow from it."""
        return list(dict.fromkeys(Cell(row, aim, seed) for seed in self.seeds for row, aim in self._aims()))

    def _aims(self) -> list[tuple[str, str]]:
        cuts = [row for row in self.rows if row in CUTS]
        decided = [row for row in cuts if CUTS[row].own] if self.own else []
        found = [(row, OWN) for row in decided]
        found += [(row, f"{budget:g}") for row in cuts for budget in self.budgets]
        found += [("uniform", row) for row in decided if "uniform" in cuts]
        found += [(row, "") for row in self.rows if row in SPARSE]
        return found + [(row, f"{target:g}") for row in self.rows if row in GATED for target in self.targets]

    def name(self, cell: Cell) -> str:
        """What a cell's files are called."""
        task = self.task.replace(":", "_").replace("/", "_")
        aim = f"-{cell.aim.replace(' ', '_')}" if cell.aim else ""
        return f"{task}-epochs{self.epochs}-{cell.row}{aim}-seed{cell.seed}"

    def folder(self, cell: Cell) -> Path:
        """Where a cell's plan and network are."""
        return self.runs / "cells" / self.name(cell)

    def record(self, cell: Cell) -> Path:
        """Where a cell is recorded."""
        return (self.records or self.runs / "records") / f"{self.name(cell)}.json"

    def bench(self, seed: int, tell: Callable[..., None] | None = None) -> Bench:
        """The task of a seed."""
        return bench(
            self.task,
            weights=self.weights,
            dense_epochs=self.dense_epochs,
            epochs=self.epochs,
            seed=seed,
            runs=self.runs,
            progress=tell,
        )


def facts(settings: Settings, cell: Cell) -> Record:
    """What tells a cell apart, as its record says it: of files, the name alone."""
    weights = None if settings.weights is None else Path(settings.weights).name
    own = {"row": cell.row, "aim": cell.aim, "seed": cell.seed, "epochs": settings.epochs}
    return {**own, "task": settings.task, "weights": weights, "dense_epochs": settings.dense_epochs}


def known(settings: Settings, cell: Cell) -> Record | None:
    """A cell's record, if there is one.

    Raises:
        ValueError: It is of other settings, or corrupt.
    """
    return read(settings.record(cell), facts(settings, cell))


def made(settings: Settings, cell: Cell, on: Callable[[int], Bench]) -> Record:
    """A cell from its record, or made and recorded.

    Args:
        settings: Of the table.
        cell: Which.
        on: Seed -> its task.
    """
    record = known(settings, cell)
    if record is not None:
        return record
    folder = settings.folder(cell)
    if cell.row in SPARSE:
        found = sparse_cell(on(cell.seed), cell.row, folder)
    elif cell.row in GATED:
        found = gated_cell(on(cell.seed), float(cell.aim))
    else:
        budget = _budget(settings, cell)
        found = _inside(settings, cell, budget) or cut_cell(on(cell.seed), cell.row, budget, folder)
    record, file = {**facts(settings, cell), **found}, settings.record(cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(record, indent=2))
    return record


def _budget(settings: Settings, cell: Cell) -> float:
    if cell.aim == OWN:
        return 1.0
    if cell.aim in CUTS:
        met = known(settings, Cell(cell.aim, OWN, cell.seed))
        assert met is not None  # made before, in the order of the cells
        return met["macs_share"]
    return float(cell.aim)


def _inside(settings: Settings, cell: Cell, budget: float) -> Record | None:
    """What the method decided by itself, if that is inside the budget already: the same plan, so the same network."""
    own = known(settings, Cell(cell.row, OWN, cell.seed)) if cell.aim != OWN and settings.own else None
    if own is None or own["macs_share"] > budget:
        return None
    return {name: value for name, value in own.items() if name not in facts(settings, cell)}


def recorded(settings: Settings) -> list[Record]:
    """The wanted cells that are recorded."""
    return [record for cell in settings.cells if (record := known(settings, cell)) is not None]


def groups(records: Sequence[Record], rows: Mapping[str, object]) -> dict[tuple[str, str], list[Record]]:
    """(row, aim) -> the records of some rows, in the order in which they come, seeds rising."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["row"] in rows:
            found.setdefault((record["row"], record["aim"]), []).append(record)
    return found


def against_uniform(records: Sequence[Record]) -> dict[tuple[str, str], list[float]]:
    """(row, aim) -> points over uniform l1 at the same macs after fine-tuning, for the seeds that both have."""
    found, gains = groups(records, CUTS), {}
    for (row, aim), some in found.items():
        other = {one["seed"]: one for one in found.get(("uniform", row if aim == OWN else aim), ())}
        both = [(one, other[one["seed"]]) for one in some if row != "uniform" and one["seed"] in other]
        pairs = [(one, base) for one, base in both if abs(one["macs_share"] - base["macs_share"]) < NEAR]
        if pairs:
            gains[row, aim] = [100 * (one["fine_tuned"]["test"] - base["fine_tuned"]["test"]) for one, base in pairs]
    return gains


def cut_table(records: Sequence[Record]) -> str:
    """Rows that cut, as a Markdown table: means over seeds of the test accuracy after each stage."""
    lines, gains = [line(CUT_HEADS), line(["---"] * len(CUT_HEADS))], against_uniform(records)
    for (row, aim), some in groups(records, CUTS).items():
        tuned = [100 * one["fine_tuned"]["test"] for one in some]
        gain = gains.get((row, aim))
        cells = [
            row,
            f"{aim} of the macs" if aim not in (OWN, *CUTS) else aim if aim == OWN else f"macs of {aim}",
            *(f"{np.mean([one[size] for one in some]):.3f}" for size in ("macs_share", "params_share")),
            f"{some[0]['prepare_epochs']} + {some[0]['fine_tune_epochs']}",
            *(f"{np.mean([100 * one[stage]['test'] for one in some]):.2f}" for stage in ("prepared", "cut")),
            f"{np.mean(tuned):.2f}",
            _drop(some, tuned),
            _interval(tuned),
            "" if gain is None else f"{np.mean(gain):+.2f} ({_interval(gain, form='+.2f')})",
            ", ".join(f"{value:.2f}" for value in tuned),
            CUTS[row].published,
        ]
        lines.append(line(cells))
    return "\n".join(lines)


def verdicts(records: Sequence[Record]) -> list[str]:
    """Where uniform l1 wins, and where it does not, in sentences."""
    said = []
    for (row, aim), gain in against_uniform(records).items():
        mean, place = float(np.mean(gain)), f"{row} ({aim if aim == OWN else f'{aim} of the macs'})"
        seeds = f"{len(gain)} seed" + "s" * (len(gain) > 1)
        if mean == 0:
            said.append(f"{place} and uniform l1 are equal, {seeds}.")
            continue
        verb = "beats" if mean > 0 else "loses to"
        sure = "" if len({value > 0 for value in gain}) == 1 else "; not in every one"
        said.append(f"{place} {verb} uniform l1 by {abs(mean):.2f} points, {seeds}{sure}.")
    return said


def sparse_table(records: Sequence[Record]) -> str:
    """Unstructured rows: zeros make no layer smaller, so that no macs are named."""
    lines = [line(SPARSE_HEADS), line(["---"] * len(SPARSE_HEADS))]
    for (row, _), some in groups(records, SPARSE).items():
        accuracy = [100 * one["fine_tuned"]["test"] for one in some]
        zeros = f"{100 * np.mean([one['sparsity'] for one in some]):.1f}"
        mean = f"{np.mean(accuracy):.2f} ({_interval(accuracy)})"
        seeds = ", ".join(f"{value:.2f}" for value in accuracy)
        lines.append(line([row, f"{some[0]['epochs']}", zeros, mean, _drop(some, accuracy), seeds, SPARSE[row]]))
    return "\n".join(lines)


def gated_table(records: Sequence[Record]) -> str:
    """Rows whose macs are dynamic: nothing is removed, and nothing here is faster."""
    lines = [line(GATED_HEADS), line(["---"] * len(GATED_HEADS))]
    for (row, aim), some in groups(records, GATED).items():
        tests = [one["test"] for one in some]
        accuracy = [100 * test["accuracy"] for test in tests]
        low, high = (np.mean([test["dynamic_macs_percentiles"][p] for test in tests]) for p in ("5", "95"))
        macs, params = (np.mean([test[key] for test in tests]) for key in ("dynamic_macs_share", "params_share"))
        mean = f"{np.mean(accuracy):.2f} ({_interval(accuracy)})"
        seeds = ", ".join(f"{value:.2f}" for value in accuracy)
        cells = [aim, f"{some[0]['epochs']}", f"{macs:.3f}", f"{low:.3f}-{high:.3f}", f"{params:.3f}", mean]
        lines.append(line([*cells, _drop(some, accuracy), seeds, GATED[row]]))
    return "\n".join(lines)


def _drop(some: Sequence[Record], accuracies: Sequence[float]) -> str:
    """Points over the dense network of the same seed."""
    dense = [100 * one["dense"]["test"] for one in some]
    return f"{np.mean(np.subtract(accuracies, dense)):+.2f}"


def _interval(values: Sequence[float], *, form: str = ".2f") -> str:
    """The 95 % t-interval of a mean from three values on."""
    return interval(values, form=form) if len(values) >= 3 else f"n = {len(values)}"


def report(settings: Settings, records: Sequence[Record]) -> str:
    """All tables that have rows, as Markdown."""
    parts = []
    if groups(records, CUTS):
        dense = {record["seed"]: 100 * record["dense"]["test"] for record in records}
        head = (
            f"{settings.task}, {settings.epochs} epochs in all for every row; dense {np.mean([*dense.values()]):.2f} %"
        )
        parts += [f"{head}; recalibrated, no refit; means over seeds", cut_table(records), *verdicts(records)]
    if groups(records, SPARSE):
        parts += ["Unstructured: all parameters, no channel removed, no fine-tuning", sparse_table(records)]
    if groups(records, GATED):
        parts += ["Dynamic macs, measured on the test split; no channel removed", gated_table(records)]
    return "\n\n".join(parts)


def main(settings: Settings) -> int:
    """Make what is missing and print the tables."""
    torch.set_num_threads(settings.threads)
    console = Console(stderr=True)
    with stages(console) as tell:
        on = cache(lambda seed: settings.bench(seed, tell))
        for number, cell in enumerate(() if settings.only_print else settings.cells):
            if known(settings, cell) is None:
                console.print(f"cell {number + 1} of {len(settings.cells)}: {settings.name(cell)}")
            made(settings, cell, on)
    sys.stdout.write(report(settings, recorded(settings)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(parse(Settings, sys.argv[1:], program="python -m benchmarks.trained_papers"))))
