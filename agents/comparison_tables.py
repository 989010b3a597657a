"""The rows of a comparison as tables: CSV with a line a cell, and cells of text for pages."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from agents.comparison_figures import aim_of
from agents.comparison_store import Record
from agents.comparison_summary import AFTER, BEFORE, Summary, score, value_of

MEASURED = (
    "search_accuracy", "test_accuracy", "search_loss", "test_loss", "fine_tuned_search_accuracy",
    "fine_tuned_test_accuracy", "fine_tuned_search_loss", "fine_tuned_test_loss", "macs", "macs_share", "params",
    "params_share", "dynamic_macs", "dynamic_macs_share", "dynamic_macs_share_5", "dynamic_macs_share_95",
    "latency_s", "latency_share",
)  # fmt: skip
"""Numbers of a line. `macs` are the same for every image, `dynamic_macs` means over images: no row has both."""

FACTS = ("importance", "repair", "recalibrate", "own_training", "evaluations", "paid_by", "own")
"""In which rows may differ."""

COLUMNS: tuple[str, ...] = (
    "task", "method", "kind", "budget", "budget_resource", "seed", "status", "reason", *MEASURED, *FACTS,
    "fine_tune_epochs", "cpu_seconds_find", "cpu_seconds_fine_tune", "seconds", "threads",
)  # fmt: skip
"""Columns of `results.csv`."""


def csv_text(records: Sequence[Record]) -> str:
    """All records, a line each; what a row does not have is empty."""
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    lines.writeheader()
    lines.writerows(map(_line, records))
    return text.getvalue()


def _line(record: Record) -> Record:
    line = {**record["cell"], "kind": record["kind"]}
    if "failed" in record:
        return line | {"status": "failed", "reason": record["failed"]}
    facts, protocol = record["facts"], record["protocol"]
    found = {name: value_of(record, name) for name in MEASURED}
    own = " ".join(f"{name}={value}" for name, value in facts["own"].items())
    return {
        **line,
        "status": "done",
        **{name: value for name, value in found.items() if value is not None},
        **{name: facts.get(name, "") for name in FACTS},
        "own": own,
        "budget_resource": protocol["budget_resource"],
        "fine_tune_epochs": facts["epochs"],
        "cpu_seconds_find": value_of(record, "find"),
        "cpu_seconds_fine_tune": value_of(record, "fine_tune"),
        "seconds": record["seconds"],
        "threads": protocol["threads"],
    }


def percent(row: Summary, name: str) -> str:
    """A mean in per cent, with half of its interval."""
    mean, half = row.mean(name), row.half(name)
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" + ("" if half is None else f" \u00b1 {100 * half:.2f}")


def number(row: Summary, name: str, form: str) -> str:
    """A mean."""
    mean = row.mean(name)
    return "" if mean is None else f"{mean:{form}}"


Column = tuple[str, Callable[[Summary], str]]
ROWS: tuple[Column, ...] = (
    ("method", lambda row: row.method),
    ("kind", lambda row: row.kind),
    ("budget", lambda row: aim_of(row, row.budget)),
    ("test accuracy, %", lambda row: percent(row, BEFORE)),
    ("fine-tuned, %", lambda row: percent(row, AFTER)),
    ("macs", lambda row: number(row, "macs_share", ".3f")),
    ("mean macs over images", lambda row: number(row, "dynamic_macs_share", ".3f")),
    ("params", lambda row: number(row, "params_share", ".3f")),
    ("latency", lambda row: number(row, "latency_share", ".2f")),
    ("importance", lambda row: row.fact("importance")),
    ("repair", lambda row: row.fact("repair")),
    ("own training before", lambda row: row.fact("own_training")),
    ("fine-tune epochs", lambda row: row.fact("epochs")),
    ("evaluations", lambda row: row.fact("evaluations")),
    ("paid by", lambda row: row.fact("paid_by")),
    ("own settings", lambda row: row.fact("own")),
    ("CPU s to find", lambda row: number(row, "find", ".2f")),
    ("seeds", lambda row: " ".join(map(str, row.seeds))),
    ("each seed, %", lambda row: " ".join(f"{100 * value:.1f}" for value in row.values(score(row)))),
)
"""Columns of the table of all rows: heading, and what stands there. Sizes are shares of the dense network's."""


def used(rows: Sequence[Summary]) -> list[Column]:
    """The columns in which something stands."""
    return [(head, cell) for head, cell in ROWS if any(cell(row) for row in rows)]


def markdown(rows: Sequence[Summary]) -> str:
    """The table of all rows for a document."""
    columns = used(rows)
    lines = [[head for head, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
