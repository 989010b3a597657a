"""Which shaper makes learning faster? Learning curves of no shaper against each, same algorithm, budget and seeds.

A cell is a shaper and a seed: a run of `agents.train`, all of whose settings but the shaper are the same. What was
interrupted goes on, what is recorded is not run again, and all rows are shown, those of losers too.

Asked is what the best plan so far is worth on the search split, evaluation by evaluation, and how many evaluations it
takes to be as good as the best of the unshaped run of the same seed is at its end. Interquartile means over seeds, with
95 % bootstrap intervals (`benchmarks.interquartile`); differences are taken seed by seed.

    python -m benchmarks.shaping_table --runs DIR
    python -m benchmarks.shaping_table --task cifar10-resnet20 --weights FILE.safetensors --budget 0.5 --seeds 0 1 2 \
        --runs DIR
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agents.config import TrainConfig
from agents.episode import Episode
from agents.plot import BLUE, GREY, png
from baselines.shaping import SHAPERS
from benchmarks.cells import Record, finished, line, read, read_or_made, search_seconds, share_row
from benchmarks.interquartile import bootstrap, interquartile_mean
from prune_env.checks import check_name
from prune_env.files import write

NONE = "none"
"""The row without a shaper, which all others are compared with, seed by seed."""
FEWEST = 3
"""Seeds of which a verdict is made: intervals of few runs are too narrow, and one in twenty misses by chance."""
FACTS = ("task", "algorithm", "shape", "episodes", "budget", "importance", "refit", "recalibrate", "seed")
"""Fields of a run that its record repeats under the same name."""
HEADS = (
    "shaper", "best at the end, %", "mean of the curve, %", "against none, points", "evaluations to none's end",
    "seeds that get there", "the learner's own episodes, %", "its last plan, %", "test, best plan, %",
    "best at the end by seed, %",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    shaper: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """The comparison of shapers.

    Raises:
        ValueError: An unknown shaper or algorithm (names the closest), or a value that no run would take.
    """

    task: str = "digits-cnn"
    """Task name."""
    weights: str | None = None
    """File with the dense weights; without it the network is trained, or loaded from the cache."""
    algorithm: str = "td3"
    """An algorithm of `agents.train`."""
    shapers: tuple[str, ...] = (NONE, *SHAPERS)
    """Shapers; none is always among them."""
    weight: float = 1.0
    """Weight of each shaper."""
    fade: int | None = None
    """Episodes over which it falls to zero; None keeps it."""
    episodes: int = 100
    """Networks that each run cuts and measures."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of splits, of dense trainings and of agents."""
    budget: float = 0.15
    """Share of the macs."""
    threads: int = 1
    """CPU threads."""
    runs: Path = Path("runs/shaping")
    """Folder of the runs."""
    records: Path | None = None
    """Folder of the finished cells, one small JSON file each; `records` in the folder of the runs by default."""
    out: Path | None = None
    """The picture; `shaping.png` in the folder of the runs by default."""
    only_print: bool = False
    """Print and draw the cells that are recorded, and run none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapers", tuple(dict.fromkeys((NONE, *self.shapers))))
        for shaper in self.shapers:
            check_name("shaper", shaper, (NONE, *SHAPERS))
        for cell in self.cells:
            self.config(cell)  # what the last run would refuse is refused before the first

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once: a seed at a time, so that what is there can be compared early."""
        return list(dict.fromkeys(Cell(shaper, seed) for seed in self.seeds for shaper in self.shapers))

    def config(self, cell: Cell) -> TrainConfig:
        """The run of a cell."""
        fade = "" if self.fade is None else f":{self.fade}"
        usual = TrainConfig()
        return TrainConfig.of(
            self.algorithm,
            task=self.task,
            weights=None if self.weights is None else str(Path(self.weights).expanduser().resolve()),
            budget=self.budget,
            shape=None if cell.shaper == NONE else f"{cell.shaper}:{self.weight:g}{fade}",
            episodes=self.episodes,
            threads=self.threads,
            seed=cell.seed,
            random_plans=0,
            # AMC's presets may say otherwise of these
            importance=usual.importance,
            refit=usual.refit,
            recalibrate=usual.recalibrate,
            calibration_images=usual.calibration_images,
        )

    def facts(self, cell: Cell) -> Record:
        """What tells a cell apart, as its record says it: of files, the name alone."""
        config = self.config(cell)
        weights = None if config.weights is None else Path(config.weights).name
        return {"shaper": cell.shaper, "weights": weights, **{name: getattr(config, name) for name in FACTS}}

    def record(self, cell: Cell) -> Path:
        """Where a cell is recorded."""
        return (self.records or self.runs / "records") / f"{self.config(cell).name}-episodes{self.episodes}.json"


def recorded_run(settings: Settings, cell: Cell) -> Record:
    """Run a cell, or go on with it, and say what came out."""
    run = finished(settings.config(cell), settings.runs / f"episodes{settings.episodes}")
    episodes, report = run.read_episodes(), run.report
    own = [episode.accuracy for episode in episodes if episode.source == "policy"]
    return {
        **settings.facts(cell),
        "threads": run.config.threads,
        "seconds": round(search_seconds(run.path), 2),
        "best": best_so_far(episodes),
        "own": float(np.mean(own)) if own else None,
        "rows": {name: share_row(row, report["dense"]) for name, row in report.items()},
    }


def best_so_far(episodes: Sequence[Episode]) -> list[float]:
    """Accuracy of the best episode (by reward, then loss) after each evaluation."""
    curve, best = [], episodes[0]
    for episode in episodes:
        best = max(best, episode, key=lambda one: one.rank)
        curve.append(best.accuracy)
    return curve


def evaluations_to(curve: Sequence[float], wanted: float) -> float:
    """Evaluations after which a curve is as good as wanted; infinite if it never is."""
    return next((number for number, value in enumerate(curve, start=1) if value >= wanted), math.inf)


@dataclass(frozen=True, eq=False)
class Row:
    """A shaper's runs beside those without a shaper of the same seeds.

    Attributes:
        shaper: Its name.
        records: Of its seeds, rising.
        plain: Of the same seeds, without a shaper.
    """

    shaper: str
    records: Sequence[Record]
    plain: Sequence[Record]

    @property
    def curves(self) -> np.ndarray:
        """`[seed, 1, evaluation]` best accuracy so far, %: one task, one stratum."""
        return 100 * np.array([record["best"] for record in self.records])[:, None]

    @property
    def gains(self) -> np.ndarray:
        """`[seed, 1]` mean of the curve over that without a shaper, points."""
        return (self.curves - Row(NONE, self.plain, self.plain).curves).mean(-1)

    @property
    def reached(self) -> np.ndarray:
        """`[seed, 1]` evaluations to what the unshaped run of the same seed has found at its end."""
        pairs = zip(self.records, self.plain, strict=True)
        return np.array([[evaluations_to(record["best"], plain["best"][-1])] for record, plain in pairs])

    def share(self, row: str, split: str) -> np.ndarray:
        """`[seed, 1]` accuracy of a row of the reports, %."""
        return 100 * np.array([[record["rows"][row][f"{split}_accuracy"]] for record in self.records])


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each shaper, over the seeds that it and the runs without a shaper have."""
    found = {(record["shaper"], record["seed"]): record for record in records}
    rows = []
    for shaper in dict.fromkeys(record["shaper"] for record in records):
        seeds = sorted(seed for name, seed in found if name == shaper and (NONE, seed) in found)
        if seeds:
            rows.append(Row(shaper, *([found[name, seed] for seed in seeds] for name in (shaper, NONE))))
    return rows


def said(scores: np.ndarray, *, form: str = ".2f", most: float = math.inf) -> str:
    """The interquartile mean and its interval; what is infinite is more than the most.

    Args:
        scores: `[seed, stratum]`.
        form: Format of the numbers.
        most: What infinite values are more than.
    """
    mean, low, high = (
        f"{value:{form}}" if math.isfinite(value) else f"> {most:g}"
        for value in (float(interquartile_mean(scores)), *bootstrap(scores).tolist())
    )
    return mean if len(scores) == 1 else f"{mean} ({low} to {high})"


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table, none first, then by the mean of their curves' gains."""
    lines = [line(HEADS), line(["---"] * len(HEADS))]
    for row in sorted(rows, key=lambda row: (row.shaper != NONE, -float(interquartile_mean(row.gains)))):
        curves, own = row.curves, [record["own"] for record in row.records]
        cells = [
            row.shaper,
            said(curves[..., -1]),
            said(curves.mean(-1)),
            "" if row.shaper == NONE else said(row.gains, form="+.2f"),
            said(row.reached, form=".0f", most=curves.shape[-1]),
            f"{int(np.isfinite(row.reached).sum())} of {len(row.records)}",
            "" if None in own else said(100 * np.array(own)[:, None]),
            said(row.share("policy", "search")) if all("policy" in one["rows"] for one in row.records) else "",
            said(row.share("learned", "test")),
            ", ".join(f"{value:.2f}" for value in curves[:, 0, -1]),
        ]
        lines.append(line(cells))
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """What the table says in one line: whose gain has an interval on one side of zero, of three seeds or more."""
    ends = {row.shaper: bootstrap(row.gains) for row in rows if row.shaper != NONE and len(row.records) >= FEWEST}
    faster = [name for name, (low, _) in ends.items() if low > 0]
    slower = [name for name, (_, high) in ends.items() if high < 0]
    told = [f"{what} with {', '.join(names)}" for what, names in (("faster", faster), ("slower", slower)) if names]
    return "; ".join(told) or "no shaper makes a difference beyond the seeds"


def figure(title: str, rows: Sequence[Row]) -> Figure:
    """Learning curves, a panel for each shaper beside the runs without one of the same seeds.

    Args:
        title: Of the picture.
        rows: Of `rows_of`.
    """
    shaped = [row for row in rows if row.shaper != NONE]
    wide = min(4, max(1, len(shaped)))
    high = max(1, -(-len(shaped) // wide))
    drawn = Figure(figsize=(3.0 * wide + 0.6, 2.5 * high + 0.8), layout="constrained", facecolor="white")
    panels = drawn.subplots(high, wide, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes, row in zip(panels, shaped, strict=False):
        plain = Row(NONE, row.plain, row.plain)
        for name, colour, curves in ((NONE, GREY, plain.curves), (row.shaper, BLUE, row.curves)):
            at, (low, high_end) = np.arange(1, curves.shape[-1] + 1), bootstrap(curves, resamples=500)
            axes.fill_between(at, low, high_end, step="post", color=colour, alpha=0.22, linewidth=0)
            axes.step(at, interquartile_mean(curves), where="post", color=colour, linewidth=1.7, label=name)
        axes.set_title(f"{row.shaper}\n{said(row.gains, form='+.1f')} points", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    for axes in panels[len(shaped) :]:
        axes.set_axis_off()
    drawn.suptitle(f"{title}: {verdict(rows)}", fontsize=10)
    drawn.supxlabel("networks cut and measured", fontsize=9)
    drawn.supylabel("best accuracy so far, search split, %", fontsize=9)
    return drawn


def main(settings: Settings) -> None:
    """Run what is missing, draw, and print the table."""
    for cell in () if settings.only_print else settings.cells:
        read_or_made(settings.record(cell), settings.facts(cell), run=lambda cell=cell: recorded_run(settings, cell))
    records = [read(settings.record(cell), settings.facts(cell)) for cell in settings.cells]
    rows = rows_of([record for record in records if record is not None])
    title = f"{settings.task}, {settings.algorithm}, {settings.budget:g} of the macs"
    fade = "kept" if settings.fade is None else f"to zero over {settings.fade} episodes"
    print(
        f"{title}; weight {settings.weight:g}, {fade}; {settings.episodes} evaluations, seeds "
        f"{', '.join(map(str, settings.seeds))}; interquartile means over seeds, 95 % bootstrap intervals\n"
    )
    print(table(rows))
    print(f"\n{verdict(rows)}")
    if rows:
        out = settings.out or settings.runs / "shaping.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, png(figure(title, rows)))
        print(f"picture: {out}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
