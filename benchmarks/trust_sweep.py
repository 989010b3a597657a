"""What trust in the runtime decision trades: test accuracy against stored parameters, at one budget of mean macs.

One run of `agents.train runtime` for each trust R, recorded as a row of `benchmarks.runtime_table` is (at 0, .5 and 1
it is that row). Recorded ones are only read, interrupted ones go on.

    python -m benchmarks.trust_sweep --task cifar10-m-cifarnet --weights FILE.safetensors --keep 0.5 \
        --trusts 0 .25 .5 .75 1 --schedule short --seed 0 --threads 2 --runs DIR --out docs/trust_sweep.png
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

from agents.plot import BLUE, GREY, png
from benchmarks.runtime_runs import Record, RunSettings, agents_row, made, recorded, row_of
from benchmarks.timing import show
from prune_env.files import write


@dataclass(frozen=True)
class Settings(RunSettings):
    """Accuracy against stored parameters over the trust in the runtime decision."""

    trusts: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Trusts R in the runtime decision, each in [0, 1]."""
    seed: int = 0
    """Seed of splits, trainings and agents."""
    out: Path = Path("docs/trust_sweep.png")
    """The picture."""
    only_draw: bool = False
    """Draw the runs that are recorded, and train none."""


def records(settings: Settings) -> dict[float, Record]:
    """Trust -> its record.

    Raises:
        ValueError: A trust that is not allowed, or none is recorded and none may be trained.
    """
    found: dict[float, Record] = {}
    for trust in sorted(set(settings.trusts)):
        settings.config(settings.seed, trust)  # refuses what is not allowed
        row, seed = row_of(trust), settings.seed
        make = partial(agents_row, settings, trust, seed)
        record = recorded(settings, row, seed) if settings.only_draw else made(settings, row, seed, make)
        if record is not None:
            found[trust] = record
    if not found:
        listed = ", ".join(f"{trust:g}" for trust in settings.trusts)
        raise ValueError(f"{settings.records or settings.runs} has no record of a run at trusts {listed}")
    return found


def figure(task: str, keep: float, found: Mapping[float, Record]) -> Figure:
    """One point per trust, and the dense network as a line.

    Args:
        task: Its name.
        keep: The share that sets the budget.
        found: Trust -> record.
    """
    tests = {trust: record["test"] for trust, record in sorted(found.items())}
    params = [test["params_share"] for test in tests.values()]
    accuracies = [100 * test["accuracy"] for test in tests.values()]
    macs = [test["dynamic_macs_share"] for test in tests.values()]
    dense = 100 * next(iter(found.values()))["dense"]["test"]
    drawn = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="white")
    axes = drawn.add_subplot()
    axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.4, label=f"dense network, {dense:.2f} %")
    axes.plot(params, accuracies, color=BLUE, marker="o", linewidth=1.6, label="R: trust in the runtime decision")
    for trust, x, y in zip(tests, params, accuracies, strict=True):
        label = axes.annotate(f"R = {trust:g}", (x, y), xytext=(6, -12), textcoords="offset points", fontsize=8)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    share = f"{min(macs):.2f}" if max(macs) - min(macs) < 0.005 else f"{min(macs):.2f}-{max(macs):.2f}"
    axes.set(
        xlabel="stored parameters, share of the dense network's (predictors and scores counted)",
        ylabel="test accuracy, %",
        title=f"{task}: every R at {share} of the dense macs (even share {keep:g})",
    )
    axes.title.set_fontsize(10)
    axes.margins(x=0.12, y=0.15)
    axes.legend(frameon=False, fontsize=8, loc="best")
    return drawn


def main(settings: Settings) -> None:
    """Train what is missing, draw, and print the numbers."""
    torch.set_num_threads(settings.threads)
    found = records(settings)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write(settings.out, png(figure(settings.task, settings.keep, found)))
    tests = {trust: record["test"] for trust, record in found.items()}
    show(
        f"{settings.task}, even share {settings.keep:g}, seed {settings.seed}; {settings.out}",
        ["trust", "test accuracy", "macs", "params"],
        [
            [
                f"{trust:g}",
                f"{test['accuracy']:.4f}",
                f"{test['dynamic_macs_share']:.3f}",
                f"{test['params_share']:.2f}",
            ]
            for trust, test in tests.items()
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
