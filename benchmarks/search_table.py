"""Searches and agents at equal evaluations: what the same number of cut and measured networks finds.

A cell is a method, a number of evaluations and a seed: a run of `agents.search_baselines` or of `agents.train`, with
the same budget, importance, refit and recalibration as all others, without fine-tuning. An agent's row is its best
episode, chosen on the search split as a search's is. What was interrupted goes on, what is recorded is not run again.

    python -m benchmarks.search_table --task cifar10-resnet20 --weights FILE.safetensors --evaluations 100 400 \
        --seeds 0 1 2 --runs DIR
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.algorithms import ALGORITHMS
from agents.config import TrainConfig, own_settings
from agents.intervals import interval
from agents.report import FREE
from agents.search_config import SearchConfig
from baselines.search import OPTIMISERS
from benchmarks.cells import COMMON, Record, finished, line, read, read_or_made, search_seconds, share_row
from prune_env.checks import check_name

RECORDED = ("task", "epochs", "budget", "importance", "refit", "recalibrate", "calibration_images", "seed")
"""Fields of a run that its record repeats under the same name."""

HEADS = (
    "plan", "evaluations", "search accuracy, %", "test accuracy before fine-tuning, %", "95 % of its mean",
    "against uniform", "macs", "the agent's last plan, test", "seconds a run", "own settings", "found by", "by seed",
)  # fmt: skip
PAIRED_HEADS = ("method", "evaluations", "search, points", "test, points", "95 % of its mean", "by seed")


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    method: str
    evaluations: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """The table of searches.

    Raises:
        ValueError: An unknown method (names the closest), or a value that no run would take.
    """

    task: str = "digits-cnn"
    """Task name."""
    weights: str | None = None
    """File with the dense weights; without it the network is trained, or loaded from the cache."""
    methods: tuple[str, ...] = (*OPTIMISERS, "td3", "td3_surrogate", "amc")
    """Methods of `agents.search_baselines` and algorithms of `agents.train`."""
    evaluations: tuple[int, ...] = (100, 400)
    """Networks that each run cuts and measures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of splits, of dense trainings and of searches."""
    against: str = "random_search"
    """Method, or row that costs no evaluation (`uniform`, `error_curves`), that every other is compared with."""
    budget: float = 0.5
    """Share of the macs."""
    importance: str = "l1"
    """Static importance: which channels a group keeps."""
    refit: str = "auto"
    """Refit of the layers behind a cut."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs")
    """Folder of the runs, in a folder below it for each number of evaluations."""
    records: Path | None = None
    """Folder of the finished cells, one small JSON file each; `records` in the folder of the runs by default."""
    only_print: bool = False
    """Print the cells that are recorded, and run none."""
    epochs: int | None = None
    """Epochs of the dense training; the task's own by default."""

    def __post_init__(self) -> None:
        for method in self.methods:
            check_name("method", method, (*OPTIMISERS, *ALGORITHMS))
        check_name("against", self.against, (*OPTIMISERS, *ALGORITHMS, *FREE))
        for cell in self.cells:
            self.config(cell)  # what the last run would refuse is refused before the first

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once: the cheap numbers of evaluations first, then seed by seed."""
        wanted = product(sorted(self.evaluations), self.seeds, self.methods)
        return list(dict.fromkeys(Cell(method, evaluations, seed) for evaluations, seed, method in wanted))

    def config(self, cell: Cell) -> TrainConfig:
        """The run of a cell, as its command writes it."""
        common: dict[str, Any] = {
            "task": self.task,
            "weights": None if self.weights is None else str(Path(self.weights).expanduser().resolve()),
            "epochs": self.epochs,
            "budget": self.budget,
            "importance": self.importance,
            "refit": self.refit,
            # AMC's presets may say otherwise of these two
            "recalibrate": TrainConfig.recalibrate,
            "calibration_images": TrainConfig.calibration_images,
            "episodes": cell.evaluations,
            "threads": self.threads,
            "seed": cell.seed,
        }
        if cell.method in OPTIMISERS:
            return SearchConfig(algorithm=cell.method, **common)
        # random search is a row of the table: no agent's report needs another
        return TrainConfig.of(cell.method, random_plans=0, **common)

    def folder(self, cell: Cell) -> Path:
        """Where a cell's run folder is: a run's own name says neither evaluations nor refit."""
        return self.runs / f"evaluations{cell.evaluations}-refit-{self.refit}"

    def record(self, cell: Cell) -> Path:
        """Where a cell is recorded."""
        name = f"{self.config(cell).name}-evaluations{cell.evaluations}-refit-{self.refit}.json"
        return (self.records or self.runs / "records") / name


def facts(settings: Settings, cell: Cell) -> Record:
    """What tells a cell apart, as its record says it: of files, the name alone."""
    config = settings.config(cell)
    weights = None if config.weights is None else Path(config.weights).name
    common = {name: getattr(config, name) for name in RECORDED}
    return {"method": cell.method, "evaluations": cell.evaluations, "weights": weights, **common}


def recorded_run(settings: Settings, cell: Cell) -> Record:
    """Run a cell, or go on with it, and say what came out."""
    run = finished(settings.config(cell), settings.folder(cell))
    report = run.report
    return {
        **facts(settings, cell),
        "spent": len(run.read_episodes()),
        "own": own_settings(run.config, decided=COMMON),
        "threads": run.config.threads,
        "seconds": round(search_seconds(run.path), 2),
        "rows": {
            ("found" if name == "learned" else name): share_row(row, report["dense"]) for name, row in report.items()
        },
    }


def known(settings: Settings, cell: Cell) -> Record | None:
    """A cell's record, if there is one.

    Raises:
        ValueError: It is of other weights or other settings, or corrupt.
    """
    return read(settings.record(cell), facts(settings, cell))


def made(settings: Settings, cell: Cell) -> Record:
    """A cell from its record, or run and recorded."""
    return read_or_made(settings.record(cell), facts(settings, cell), run=lambda: recorded_run(settings, cell))


def percent(rows: Mapping[int, Record], split: str) -> list[float]:
    """Accuracy of each seed's row in per cent."""
    return [100 * row[f"{split}_accuracy"] for _, row in sorted(rows.items())]


def differences(rows: Mapping[int, Record], base: Mapping[int, Record], split: str) -> list[float]:
    """Accuracy over that of another row of the same seed, in points, for the seeds that both have."""
    name = f"{split}_accuracy"
    return [100 * (rows[seed][name] - base[seed][name]) for seed in sorted(rows.keys() & base.keys())]


def groups(records: Sequence[Record]) -> dict[tuple[int, str], list[Record]]:
    """(evaluations, method) -> records; few evaluations first, methods in the order in which they come."""
    found: dict[tuple[int, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["evaluations"]):
        found.setdefault((record["evaluations"], record["method"]), []).append(record)
    return found


def rows_of(records: Sequence[Record], name: str) -> dict[int, Record]:
    """Seed -> a row of the records that have it.

    Of several of one seed, which only rows that cost no evaluation have, it is that of the method with the fewest
    settings of its own: they may limit those plans, too.
    """
    ordered = sorted(records, key=lambda record: (record["seed"], -len(record["own"])))
    return {record["seed"]: record["rows"][name] for record in ordered if name in record["rows"]}


def table(records: Sequence[Record]) -> str:
    """Means over seeds as a Markdown table, then each seed's test accuracy."""
    lines = [line(HEADS), line(["---"] * len(HEADS))]
    uniform = rows_of(records, "uniform")
    free = {name: rows for name in ("dense", *FREE) if (rows := rows_of(records, name))}
    for name, rows in free.items():
        base = {} if name == "uniform" else uniform
        lines.append(line([name, "", *_measured(rows, base), "", "", "", "", _by_seed(rows)]))
    for (evaluations, method), some in groups(records).items():
        found, policy = (rows_of(some, name) for name in ("found", "policy"))
        spent = [record["spent"] for record in some]
        fewer = f" (spent {', '.join(map(str, spent))})" if min(spent) < evaluations else ""
        last = f"{np.mean(percent(policy, 'test')):.2f}" if policy else ""
        seconds = f"{np.mean([record['seconds'] for record in some]):.1f}"
        own = ", ".join(f"{name} {value}" for name, value in some[0]["own"].items())
        # a search that found no better plan than one it was given has that plan's row
        who = ", ".join(dict.fromkeys(row["source"] for _, row in sorted(found.items())))
        cells = [method, f"{evaluations}{fewer}", *_measured(found, uniform), last, seconds, own, who, _by_seed(found)]
        lines.append(line(cells))
    return "\n".join(lines)


def paired_table(records: Sequence[Record], against: str) -> str:
    """What each method finds beyond another as a Markdown table: the same seed, as many evaluations, or none."""
    lines = [line(PAIRED_HEADS), line(["---"] * len(PAIRED_HEADS))]
    found = {key: rows_of(some, "found") for key, some in groups(records).items()}
    for (evaluations, method), rows in found.items():
        base = rows_of(records, against) if against in FREE else found.get((evaluations, against), {})
        if method == against or not rows.keys() & base.keys():
            continue
        search, test = (differences(rows, base, split) for split in ("search", "test"))
        cells = [f"{np.mean(search):+.2f}", f"{np.mean(test):+.2f}", interval(test, form="+.2f")]
        lines.append(line([method, str(evaluations), *cells, ", ".join(f"{value:+.2f}" for value in test)]))
    return "\n".join(lines)


def _measured(rows: Mapping[int, Record], base: Mapping[int, Record]) -> list[str]:
    """Cells from the search accuracy to the macs."""
    search, test = (percent(rows, split) for split in ("search", "test"))
    gains = differences(rows, base, "test")
    against = f"{np.mean(gains):+.2f}" if gains else ""
    macs = f"{np.mean([row['macs_share'] for row in rows.values()]):.3f}"
    return [f"{np.mean(search):.2f}", f"{np.mean(test):.2f}", interval(test), against, macs]


def _by_seed(rows: Mapping[int, Record]) -> str:
    return ", ".join(f"{100 * row['test_accuracy']:.2f}" for _, row in sorted(rows.items()))


def recorded(settings: Settings) -> list[Record]:
    """The wanted cells that are recorded."""
    return [record for cell in settings.cells if (record := known(settings, cell)) is not None]


def main(settings: Settings) -> None:
    """Run what is missing and print the tables."""
    for cell in () if settings.only_print else settings.cells:
        made(settings, cell)
    records = recorded(settings)
    one = settings.config(settings.cells[0])
    print(
        f"{settings.task} at {settings.budget:g} of the macs, before fine-tuning; {one.importance} importance, refit "
        f"{one.refit}, recalibrated on {one.calibration_images} training images; means over seeds, 95 % t-intervals\n"
    )
    print(table(records))
    spent = "no evaluation" if settings.against in FREE else "as many evaluations"
    print(f"\nagainst {settings.against} with the same seed and {spent}, points\n")
    print(paired_table(records, settings.against))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
