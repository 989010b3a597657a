"""`python -m agents.compare`: learned policies, heuristics, papers, searches and runtime methods, side by side."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agents.cli import INTERRUPTED, guarded, parse, stages
from agents.comparison import DEMONSTRATION, Cell, Comparison
from agents.comparison_cell import measured
from agents.comparison_executor import EXECUTORS, imported_ray, run_cells
from agents.comparison_methods import DENSE
from agents.comparison_report import write_report
from agents.comparison_store import Store, read_record
from agents.evaluate import DISAGREES, disagreements
from prune_env.checks import check_name

PROGRAM = "python -m agents.compare"


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Raises:
        ValueError: An unknown executor, or a number that is not allowed.
    """

    comparison: tyro.conf.OmitArgPrefixes[Comparison] = field(default_factory=Comparison)
    """What is compared."""
    runs: Path = Path("runs/comparison")
    """Folder of the results."""
    workers: int | None = None
    """Cells measured at the same time; by default as many as cores have room for their threads."""
    executor: str = "processes"
    """Where cells are measured: processes, or ray (needs the extra [ray])."""
    retry_failed: bool = False
    """Measure cells again that failed before."""
    resume: Path | None = None
    """Results folder to go on with; what is compared is its own."""
    report_only: Path | None = None
    """Results folder to report on as it is; measures nothing."""
    verify: tuple[Path, ...] = ()
    """Records (DIR/cells/NAME.json) whose cells are measured anew, from nothing, and compared with them."""

    def __post_init__(self) -> None:
        check_name("executor", self.executor, EXECUTORS)
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; at least 1 is allowed")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    order, console = parse(Order, arguments, program=PROGRAM), Console()
    if order.verify:
        return max([verified(file, console) for file in order.verify])
    if order.report_only is not None:
        return _report(Store.open(order.report_only), console)
    if order.resume is not None:
        path, comparison = order.resume, Store.open(order.resume).comparison
    elif arguments:
        path, comparison = order.runs, order.comparison
    else:
        path, comparison = Path("runs/comparison-digits"), DEMONSTRATION
    if order.executor == "ray":
        imported_ray()
    with stages(console) as tell:
        tell(0, 1, "checking budgets")
        comparison.check_reachable()
    store = Store.create(path, comparison)
    for record in store.records():  # a record that was changed stops a comparison at its beginning
        if order.retry_failed and "failed" in record:
            store.forget(Cell(**record["cell"]))
    workers = order.workers or max(1, (os.cpu_count() or 1) // comparison.threads)
    try:
        with bar(console, store, comparison.cells, workers) as (finished, under_way):
            executor = EXECUTORS[order.executor](path, workers)
            run_cells(store, comparison.cells, executor, finished=finished, under_way=under_way)
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; go on with: {PROGRAM} --resume {path}", soft_wrap=True)
        console.print(f"report on what is there: {PROGRAM} --report-only {path}", soft_wrap=True)
        return INTERRUPTED
    return _report(store, console)


def _report(store: Store, console: Console) -> int:
    """Write the report, and say what it says."""
    report = write_report(store)
    for line in report.lead:
        console.print(line, markup=False)
    console.print(f"report: {store.path / 'report.html'}", soft_wrap=True)
    return 0


def verified(file: Path, console: Console) -> int:
    """Measure a record's cell anew, from nothing, and compare.

    Raises:
        ValueError: The record was changed, failed, or is of another protocol than its folder.
    """
    record, store = read_record(file), Store.open(file.parent.parent)
    cell, comparison = Cell(**record["cell"]), store.comparison
    if "failed" in record:
        raise ValueError(f"{file} has nothing to verify: the cell failed ({record['failed']})")
    with tempfile.TemporaryDirectory() as folder, stages(console) as tell:
        found = measured(comparison, cell, Path(folder) / "work", tell=tell)
    if found["protocol"] != record["protocol"]:
        raise ValueError(f"{file} was measured under another protocol than that of {store.path / 'config.json'}")
    wrong = disagreements(record["measured"], found["measured"])
    if found.get("plan") != record.get("plan"):
        wrong.append("the plan is another one")
    for line in wrong:
        console.print(f"the record does not agree: {line}", soft_wrap=True)
    if not wrong:
        console.print(f"{cell.name}: the record agrees", soft_wrap=True)
    return DISAGREES if wrong else 0


@contextmanager
def bar(console: Console, store: Store, cells: Sequence[Cell], workers: int) -> Iterator[tuple]:
    """Progress with the time left, as two functions: told about a finished cell, and about those under way."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    before, seconds, failed = sum(map(store.finished, cells)), {}, set()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("", total=len(cells))
        done: list[Cell] = []

        def finished(cell: Cell) -> None:
            done.append(cell)
            record = store.record(cell) or {}
            if "failed" in record:
                failed.add(cell)
            else:
                seconds.setdefault(cell.method, []).append(record["seconds"])
            if len(done) > before:
                said = record.get("failed") or f"{100 * record['measured']['test_accuracy']:.2f} %"
                left = time_left(seconds, [one for one in cells if one not in done], workers)
                console.print(f"{len(done)}/{len(cells)} {cell.name}: {said}; {left}", markup=False, soft_wrap=True)

        def under_way(running: Sequence[Cell]) -> None:
            left = time_left(seconds, [cell for cell in cells if cell not in done], workers)
            names = ", ".join(cell.method for cell in running)
            text = f"{left}{f', {len(failed)} failed' if failed else ''}: {names}"
            progress.update(line, completed=len(done), description=text)

        yield finished, under_way


def time_left(seconds: dict[str, list[float]], cells: Sequence[Cell], workers: int) -> str:
    """How long the rest takes, from what finished cells took: a method's own mean, or that of all methods.

    What the dense network took says nothing of methods: nothing is searched or fine-tuned there.

    Args:
        seconds: Method -> of each of its finished cells.
        cells: Not finished.
        workers: Cells measured at the same time.
    """
    means = {method: sum(taken) / len(taken) for method, taken in seconds.items()}
    pruned = [mean for method, mean in means.items() if method != DENSE]
    if not pruned and any(cell.method not in means for cell in cells):
        return "time left unknown"
    usual = sum(pruned) / max(len(pruned), 1)
    left = sum(means.get(cell.method, usual) for cell in cells) / workers
    hours, minutes = divmod(round(left / 60), 60)
    return f"about {hours} h {minutes} min left" if hours else f"about {max(minutes, 1)} min left" if cells else "done"


if __name__ == "__main__":
    sys.exit(main())
