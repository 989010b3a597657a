"""Where cells are measured: in processes of this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agents.cli import INTERRUPTED
from agents.comparison import Cell
from agents.comparison_cell import failure, work_on
from agents.comparison_store import Store

RETRIES = 2
"""How often a cell whose process died is begun again, before it counts as failed."""

PAUSE_S = 0.2
"""Seconds between two looks at what has ended."""


@runtime_checkable
class Executor(Protocol):
    """Measures cells at the same time.

    Attributes:
        slots: How many.
    """

    slots: int

    def start(self, cell: Cell) -> None:
        """Begin with a cell."""
        ...

    def ended(self) -> list[tuple[Cell, str]]:
        """Cells that are no longer under way since the last call, and how their process died, if it did."""
        ...

    def stop(self) -> None:
        """Interrupt what is under way; it can be gone on with."""
        ...


class Processes:
    """A new process for each cell, so that nothing of one cell is left in another, and each can be killed alone.

    They are forked from a server that has imported everything and done nothing.

    Args:
        folder: The results folder.
        workers: Processes at the same time.
        method: How they start, in Python's words.
    """

    def __init__(self, folder: Path, workers: int, *, method: str = "forkserver") -> None:
        self.folder, self.slots = folder, workers
        # what all contexts have in common has no Process, says typeshed: each kind has its own
        self.context: Any = multiprocessing.get_context(method)
        self.context.set_forkserver_preload([__name__])
        self.running: dict[Cell, Any] = {}

    def start(self, cell: Cell) -> None:
        """Begin with a cell."""
        process = self.context.Process(target=_measure, args=(self.folder, cell), name=cell.name)
        process.start()
        self.running[cell] = process

    def ended(self) -> list[tuple[Cell, str]]:
        """Cells whose processes are over, and how they died."""
        over = [cell for cell, process in self.running.items() if not process.is_alive()]
        return [(cell, _death(self.running.pop(cell).exitcode)) for cell in over]

    def stop(self) -> None:
        """Ask all processes to end, and wait until they have given their cells back."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.join()
        self.running.clear()


def _measure(folder: Path, cell: Cell) -> None:
    """What a process does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work_on(folder, cell)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _death(code: int) -> str:
    if code >= 0:
        return "" if code == 0 else f"its process ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process was killed by signal {-code}"


class RayTasks:
    """A task for each cell, on the cluster of `$RAY_ADDRESS`, or on a local one.

    All machines see the results folder under the same path, and data and weights as this one does.

    Args:
        folder: The results folder.
        workers: CPUs of a local cluster; a cluster that is there has its own.

    Raises:
        ValueError: Ray is not installed.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self.ray: Any = imported_ray()
        self.folder = folder.resolve()
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        self.ray.init(log_to_driver=False, **local)
        self.slots = int(self.ray.cluster_resources().get("CPU", 1))
        # a worker that dies takes its task with it, and Ray begins it anew: its claim is then a dead process's
        self.task = self.ray.remote(num_cpus=1, max_retries=RETRIES)(work_on)
        self.running: dict[Any, Cell] = {}

    def start(self, cell: Cell) -> None:
        """Begin with a cell."""
        self.running[self.task.remote(self.folder, cell)] = cell

    def ended(self) -> list[tuple[Cell, str]]:
        """Cells whose tasks are over, and how they died after all retries."""
        over, _ = (
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0) if self.running else ((), ())
        )
        found = []
        for task in over:
            try:
                self.ray.get(task)
                died = ""
            except self.ray.exceptions.RayError as error:
                died = f"its Ray task failed: {str(error).splitlines()[0]}"
            found.append((self.running.pop(task), died))
        return found

    def stop(self) -> None:
        """Leave the cluster; a local one ends, and its processes with it."""
        for task in self.running:
            self.ray.cancel(task, force=True)
        self.running.clear()
        self.ray.shutdown()


def imported_ray() -> Any:
    """Ray.

    Raises:
        ValueError: It is not installed; names the extra.
    """
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ValueError("executor 'ray' needs Ray, which is not installed: pip install 'prune-env[ray]'") from None


EXECUTORS: dict[str, Callable[[Path, int], Executor]] = {"processes": Processes, "ray": RayTasks}


def run_cells(
    store: Store,
    cells: Sequence[Cell],
    executor: Executor,
    *,
    finished: Callable[[Cell], None] = lambda cell: None,
    under_way: Callable[[Sequence[Cell]], None] = lambda cells: None,
    pause_s: float = PAUSE_S,
) -> None:
    """Measure all cells that have no record yet, whoever else works in the folder.

    Args:
        store: The results folder.
        cells: In this order.
        executor: Where.
        finished: Told about every cell that has a record now, those from before included.
        under_way: Told which cells are measured here right now.
        pause_s: Seconds between two looks.

    Raises:
        KeyboardInterrupt: Interrupted; the same call goes on.
    """
    waiting, running, deaths = list(cells), set[Cell](), Counter[Cell]()
    try:
        while waiting or running:
            for cell in [cell for cell in waiting if store.finished(cell)]:
                waiting.remove(cell)
                finished(cell)
            for cell in [cell for cell in waiting if not store.held(cell)][: executor.slots - len(running)]:
                waiting.remove(cell)
                running.add(cell)
                executor.start(cell)
            under_way([cell for cell in cells if cell in running])
            for cell, died in executor.ended():
                running.remove(cell)
                deaths[cell] += bool(died)
                if died and deaths[cell] > RETRIES:
                    _give_up(store, cell, f"{died}, {deaths[cell]} times")
                # finished, or to be begun anew, or somebody else's for now
                waiting.insert(0, cell)
            time.sleep(pause_s)
    finally:
        executor.stop()


def _give_up(store: Store, cell: Cell, reason: str) -> None:
    with store.claimed(cell) as ours:
        if ours:
            store.save(cell, failure(cell, reason))
