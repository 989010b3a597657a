"""Runtime pruning at one budget of mean macs: dense, static only, FBS, runtime only, both.

The budget is what the same share of channels in every layer costs, predictors not counted; what each row costs counts
them. All rows have the same dense network and the same epochs of training. `static`, `runtime` and `both` are runs of
`agents.train runtime` at trust 0, 1 and .5; `fbs`, `runtime_uniform` and `static_uniform` are baselines with the same
share in every layer. What was interrupted goes on, what is finished is only read.

    python -m benchmarks.runtime_table --task cifar10-m-cifarnet --weights FILE.safetensors --keep 0.5 \
        --schedule short --seeds 0 --threads 2 --runs DIR
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from agents.cli import stages
from agents.runtime_options import network_epochs
from agents.runtime_train import task_of
from baselines.runtime import RUNTIME_METHODS, attached, run_runtime
from benchmarks.runtime_runs import TRUSTS, Record, RunSettings, agents_row, made, recorded
from prune_env.checks import check_name
from prune_env.files import write
from prune_env.number_format import number_format
from prune_env.pruning import archive
from prune_env.pruning.engine.deployed import deploy
from prune_env.pruning.engine.measurement import compare_latency
from prune_env.pruning.gating.accounting import Accounting
from prune_env.pruning.gating.stored import plan_of, static_decisions
from prune_env.pruning.measure import Meter

IMAGES = 16
"""Test images that latencies are taken on."""

NAMES = {
    "static": "static only, R = 0",
    "fbs": "FBS",
    "runtime": "runtime only, R = 1",
    "both": "both, R = .5",
    "runtime_uniform": "runtime scores, even share",
    "static_uniform": "static scores, even share",
}
"""Row -> what the table calls it, in the table's order."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """The table of runtime pruning."""

    rows: tuple[str, ...] = ("static", "fbs", "runtime", "both")
    """Rows to make, of static, fbs, runtime, both, runtime_uniform and static_uniform."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of splits, trainings and agents."""
    latency: tuple[int, ...] = ()
    """Numbers of threads to time each row's deployed network with, for one image; leave the machine alone then."""
    only_print: bool = False
    """Print the rows that are recorded, and make none."""

    def __post_init__(self) -> None:
        for name in self.rows:
            check_name("row", name, NAMES)

    def network(self, row: str, seed: int) -> Path:
        """Where a row's deployed network is."""
        if row in TRUSTS:
            return self.runs / self.config(seed, TRUSTS[row]).name
        return self.runs / f"{self.task}-keep{self.keep:g}-baselines-{row}-seed{seed}" / "deployed"


def baseline_row(settings: Settings, row: str, seed: int) -> Record:
    """A row with the same share in every layer, trained for as many epochs."""
    config = settings.config(seed)
    with stages(Console()) as tell:
        task = task_of(config, progress=tell)
        budget = Accounting.of(attached(task)).even_macs(settings.keep)
        result = run_runtime(
            row,
            task,
            epochs=network_epochs(config),
            budget=budget,
            seed=seed,
            progress=tell,
            folder=settings.network(row, seed).parent,
            threads=settings.threads,
        )
        if not settings.network(row, seed).exists():
            plan = plan_of(result.gated, static_decisions(result.gated, result.decide.static_keeps, result.trust))
            archive.save(deploy(result.gated, result.decide), plan, settings.network(row, seed))
        dtype = number_format(task.network, task.example)
        dense = {
            name: Meter(*split.take(len(split)), dtype=dtype).accuracy_and_loss(task.network)[0]
            for name, split in (("search", task.search), ("test", task.test))
        }
    found = {"search": result.search.row(), "test": result.test.row(), "found_keep": result.keep}
    return {"dense": dense, "epochs": network_epochs(config), "trust": result.trust, **found}


def _row(settings: Settings, row: str, seed: int) -> Record:
    if row in RUNTIME_METHODS:
        return baseline_row(settings, row, seed)
    return agents_row(settings, TRUSTS[row], seed)


def timed(settings: Settings, row: str, seed: int) -> None:
    """Add the latency of a row's deployed network, and of the dense one beside it, to its record."""
    record = recorded(settings, row, seed)
    task, deployed = task_of(settings.config(seed)), archive.load(settings.network(row, seed))
    images = task.test.take(IMAGES)[0].float().split(1)
    record["latency_ms"] = {
        str(threads): {
            name: 1e3 * latency.median_s
            for name, latency in compare_latency(task.network, deployed, images, threads=threads).items()
        }
        for threads in settings.latency
    }
    write(settings.record(row, seed), json.dumps(record, indent=2))


def _latency(tests: Sequence[Record]) -> str:
    """Milliseconds and gain by number of threads, means over seeds."""
    cells = []
    for threads in tests[0].get("latency_ms", {}):
        both = [record["latency_ms"][threads] for record in tests if threads in record.get("latency_ms", {})]
        dense, deployed = (float(np.mean([one[name] for one in both])) for name in ("dense", "deployed"))
        cells.append(f"{deployed:.2f} ({dense / deployed:.2f}x)")
    return ", ".join(cells)


def table(records: Sequence[Record]) -> str:
    """The rows as a Markdown table: means over seeds, then each seed's accuracy and its distance to dense."""
    lines = [
        "| decisions | test accuracy, % | against dense | fewer macs | macs, 5-95 % | by image | params | ms an image "
        "| by seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {record["seed"]: record["dense"]["test"] for record in records}
    if dense:
        seeds = ", ".join(f"{100 * value:.2f}" for _, value in sorted(dense.items()))
        mean = 100 * np.mean(list(dense.values()))
        lines.append(f"| dense | {mean:.2f} | | 1.00x | 1.000 | 0 % | 1.00 | {_dense(records)} | {seeds} |")
    for row, name in NAMES.items():
        some = sorted((record for record in records if record["row"] == row), key=lambda record: record["seed"])
        if not some:
            continue
        tests = [record["test"] for record in some]
        accuracies = [100 * test["accuracy"] for test in tests]
        drops = [a - 100 * record["dense"]["test"] for a, record in zip(accuracies, some, strict=True)]
        low, high = (np.mean([test["dynamic_macs_percentiles"][p] for test in tests]) for p in ("5", "95"))
        macs, params = (float(np.mean([test[key] for test in tests])) for key in ("dynamic_macs_share", "params_share"))
        varying = np.mean([np.mean(test.get("varying_channels") or [0]) for test in tests])
        seeds = ", ".join(f"{a:.2f} ({d:+.2f})" for a, d in zip(accuracies, drops, strict=True))
        lines.append(
            f"| {name} | {np.mean(accuracies):.2f} | {np.mean(drops):+.2f} | {1 / macs:.2f}x "
            f"| {low:.3f}-{high:.3f} | {100 * varying:.0f} % | {params:.2f} | {_latency(some)} | {seeds} |"
        )
    return "\n".join(lines)


def _dense(records: Sequence[Record]) -> str:
    """Milliseconds of the dense network by number of threads, means over all rows that were timed."""
    times = [record["latency_ms"] for record in records if "latency_ms" in record]
    return ", ".join(
        f"{np.mean([one[threads]['dense'] for one in times if threads in one]):.2f}" for threads in (times or [{}])[0]
    )


def records(settings: Settings) -> list[Record]:
    """The wanted rows that are recorded."""
    found = (recorded(settings, row, seed) for seed in settings.seeds for row in settings.rows)
    return [record for record in found if record is not None]


def main(settings: Settings) -> None:
    """Make what is missing and print the table."""
    torch.set_num_threads(settings.threads)
    for seed in () if settings.only_print else settings.seeds:
        for row in settings.rows:
            made(settings, row, seed, partial(_row, settings, row, seed))
    for seed in settings.seeds if settings.latency else ():
        for row in settings.rows:
            if recorded(settings, row, seed) is not None:
                timed(settings, row, seed)
    print(table(records(settings)))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
