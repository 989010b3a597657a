"""The report of a comparison, from its records alone: `report.html`, `results.csv`, `results.md`, TensorBoard."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from PIL import Image

from agents import comparison_figures as figures
from agents import comparison_page as page
from agents import comparison_words as words
from agents.comparison_figures import Drawing, aim_of
from agents.comparison_methods import DENSE, kind_of
from agents.comparison_store import Record, Store
from agents.comparison_summary import Summary, claims, rank_table, score, summaries
from agents.comparison_tables import csv_text, markdown, used
from prune_env.files import write


@dataclass(frozen=True, eq=False)
class Section:
    """What is said about one task.

    Attributes:
        task: Its name.
        rows: Finished rows, the dense one included.
        records: All records, failed ones included.
        missing: Names of cells without a record.
    """

    task: str
    rows: list[Summary]
    records: list[Record]
    missing: list[str]

    @property
    def pruned(self) -> list[Summary]:
        """All rows but the dense one."""
        return [row for row in self.rows if row.method != DENSE]

    @property
    def dense(self) -> Summary | None:
        """The dense row, if it is there."""
        return next((row for row in self.rows if row.method == DENSE), None)

    @property
    def lead(self) -> list[str]:
        """The first words."""
        return words.lead(self.rows, self.records, len(self.missing))

    @property
    def order(self) -> list[str]:
        """Methods, the best mean rank first; runtime methods, which are not ranked, last."""
        dynamic = dict.fromkeys(row.method for row in self.pruned if row.dynamic)
        return [*rank_table(self.pruned), *dynamic]

    @property
    def shown(self) -> float:
        """The budget whose keep profiles are shown: the smallest, where methods differ most."""
        return min(row.budget for row in self.pruned if not row.dynamic)

    def drawings(self) -> Iterator[Drawing]:
        """All figures that the rows allow."""
        rows, static = self.pruned, [row for row in self.pruned if not row.dynamic]
        if not rows:
            return
        yield Drawing(
            "tradeoff",
            words.title_of_tradeoff(rows),
            "Means over seeds; bars are 95 % intervals. Up and to the left is better. Latency is that of one image, in "
            "turns with the dense network: CPU time of one thread, or with several threads the wall's, which other "
            "cells disturb.",
            figures.tradeoff(rows, self.dense),
        )
        yield Drawing(
            "methods",
            words.title_of_methods(rows) if static else "Accuracy of the runtime methods",
            "Sorted by mean rank. Light bars are 95 % intervals over seeds.",
            figures.by_method(rows, self.dense, self.order),
        )
        if static:
            some = [row for row in static if row.budget == self.shown]
            yield Drawing(
                "profiles",
                words.title_of_profiles(some),
                f"Share of the channels of each group that is kept at {aim_of(some[0], self.shown)}, in %, means over "
                "seeds. Bright: kept. Dark: pruned.",
                figures.profiles(some, self.order),
            )
        yield Drawing(
            "costs",
            words.title_of_costs(rows),
            "Own training before pruning included, unless it was cached; without the fine-tuning that all rows get. "
            "An evaluation is a network that was cut, repaired and measured on the search split.",
            figures.costs(rows, self.order),
        )
        if any(row.dynamic for row in rows):
            yield Drawing(
                "spreads",
                words.title_of_spreads(rows),
                "Runtime methods choose channels anew for every image; easy images may pay for hard ones.",
                figures.spreads(rows),
            )


@dataclass(frozen=True, eq=False)
class Report:
    """What was written.

    Attributes:
        lead: Its first words.
    """

    lead: list[str]


def sections(store: Store) -> list[Section]:
    """A section a task.

    Raises:
        ValueError: A record was changed, or is corrupt.
    """
    comparison, records = store.comparison, store.records()
    rows = summaries(records)
    missing = [cell for cell in comparison.cells if not store.finished(cell)]
    return [
        Section(
            task,
            [row for row in rows if row.task == task],
            [record for record in records if record["cell"]["task"] == task],
            [cell.name for cell in missing if cell.task == task],
        )
        for task in comparison.tasks
    ]


def write_report(store: Store) -> Report:
    """Write everything that can be said about a results folder, finished or not.

    Raises:
        ValueError: A record was changed, or is corrupt.
    """
    parts = sections(store)
    with mpl.rc_context(figures.STYLE):
        drawings = {part.task: list(part.drawings()) for part in parts}
        write(store.path / "report.html", html(parts, drawings))
        _write_events(store, parts, drawings)
    write(store.path / "results.csv", csv_text(store.records()))
    write(store.path / "results.md", "\n".join(_document(part) for part in parts))
    return Report([line for part in parts for line in part.lead])


def html(parts: Sequence[Section], drawings: dict[str, list[Drawing]]) -> str:
    """The page."""
    title = f"Channel pruning compared: {', '.join(part.task for part in parts)}"
    body = [page.element("h1", title)]
    for number, part in enumerate(parts):
        if len(parts) > 1:
            body.append(page.element("h2", part.task))
        body.append(page.block("lead", [page.element("p", line) for line in part.lead]))
        for drawing in drawings[part.task]:
            svg = drawing.svg.replace(f"{drawing.name}-", f"{drawing.name}{number}-")
            body += page.figure(drawing.title, drawing.note, svg)
        body += [*_ranks(part), *_claims(part), *_rows(part), *_failures(part), *_missing(part)]
    return page.page(title, body)


def _ranks(part: Section) -> list[str]:
    table = rank_table(part.pruned)
    if not table:
        return []
    budgets = sorted({budget for ranks in table.values() for budget in ranks}, reverse=True)
    named = {row.budget: aim_of(row, row.budget) for row in part.pruned}
    lines = []
    for method, ranks in table.items():
        mean = f"{np.mean(list(ranks.values())):.2f}"
        cells = [f"{ranks[budget]:g}" if budget in ranks else "-" for budget in budgets]
        lines.append([method, *cells, mean if len(ranks) == len(budgets) else f"({mean})"])
    heads = ["method", *(named[budget] for budget in budgets), "mean rank"]
    note = "Rank by mean test accuracy among static methods; equals share a rank. Ranks of close means are luck."
    return [
        page.element("h3", words.title_of_ranks(table)),
        page.element("p", note, "note"),
        page.table(heads, lines, [kind_of(method) for method in table]),
    ]


def _claims(part: Section) -> list[str]:
    found, looked = claims(part.pruned)
    if not found:
        return []
    note = (
        "Pairs of rows with the same budget, evaluations and training, seed by seed, at least 3 seeds: those whose "
        "95 % interval of the difference excludes 0. They are not corrected for looking at many pairs."
    )
    lines = [
        [
            one.better,
            one.worse,
            aim_of(part.pruned[0], one.budget),
            f"{100 * one.mean:.2f}",
            f"{100 * (one.mean - one.half):.2f} to {100 * (one.mean + one.half):.2f}",
            str(one.seeds),
            str(one.evaluations),
        ]
        for one in found
    ]
    heads = ["better", "than", "budget", "points", "95 % interval", "seeds", "evaluations each"]
    return [
        page.element("h3", f"{len(found)} of {looked} comparable pairs differ"),
        page.element("p", note, "note"),
        page.table(heads, lines),
    ]


def _rows(part: Section) -> list[str]:
    if not part.rows:
        return []
    columns = used(part.rows)
    lines = [[cell(row) for _, cell in columns] for row in ordered(part)]
    note = (
        "Means over seeds with half of their 95 % interval; sizes and latency are shares of the dense network's. "
        "Macs are the same for every image; mean macs over images belong to runtime methods."
    )
    kinds = [row.kind for row in ordered(part)]
    return [
        page.element("h3", "All rows, and everything in which they differ"),
        page.element("p", note, "note"),
        page.table([head for head, _ in columns], lines, kinds),
    ]


def ordered(part: Section) -> list[Summary]:
    """Rows as tables show them: dense, then budget by budget, static before runtime, best first."""

    def place(row: Summary) -> tuple:
        return row.method != DENSE, -row.budget, row.dynamic, -(row.mean(score(row)) or 0.0)

    return sorted(part.rows, key=place)


def _failures(part: Section) -> list[str]:
    failed = [record for record in part.records if "failed" in record]
    if not failed:
        return []
    lines = [[*(str(value) for value in list(record["cell"].values())[1:]), record["failed"]] for record in failed]
    return [
        page.element("h3", f"{len(failed)} of {len(part.records)} cells failed"),
        page.table(["method", "budget", "seed", "reason"], lines, ["failed"] * len(lines)),
    ]


def _missing(part: Section) -> list[str]:
    if not part.missing:
        return []
    return [page.element("p", f"Not measured yet: {', '.join(part.missing)}.", "note")]


def _document(part: Section) -> str:
    """Lead and table for a document."""
    text = "\n\n".join(part.lead)
    return f"**{part.task}.** {text}\n\n{markdown(ordered(part)) if part.rows else ''}"


def _write_events(store: Store, parts: Sequence[Section], drawings: dict[str, list[Drawing]]) -> None:
    """The same figures and means for TensorBoard, in place of those of an earlier report."""
    with warnings.catch_warnings():
        # tensorboard looks at tensorflow's version, if that is installed
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

    folder = store.path / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for part in parts:
            writer.add_text(f"{part.task}/lead", "\n\n".join(part.lead))
            for drawing in drawings[part.task]:
                pixels = np.asarray(Image.open(io.BytesIO(drawing.png)).convert("RGB"))
                writer.add_image(f"{part.task}/{drawing.name}", pixels, dataformats="HWC")
                writer.add_text(f"{part.task}/{drawing.name}", f"{drawing.title}. {drawing.note}")
            for row in part.pruned:
                # the step is the budget in per mille: curves over budgets
                step = round(1000 * row.budget) if row.budget <= 1 else round(row.budget)
                writer.add_scalar(f"{part.task}/{row.method}/test_accuracy", row.mean(score(row)), step)
