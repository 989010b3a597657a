"""The results folder of a comparison: its config, written first, and one record a cell, which claims protect.

config.json            the comparison; the folder belongs to its protocol, cells may be added
cells/NAME.json        the record of a finished cell, with a digest of its content
cells/NAME.claim       who measures a cell right now; gone when it is finished
logs/NAME.log          what a cell said
work/NAME/             checkpoints of a cell under way; gone when it is finished

Several processes, also of several machines that share the folder, may work in it at the same time. A cell belongs to
whoever created its claim. The claim of a process that died is taken over: on its own machine the process is looked
for; from elsewhere a claim is dead once nobody has touched it for a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from agents.comparison import LISTS, Cell, Comparison
from prune_env.files import sweep, write

Record = dict[str, Any]

TOUCH_S, DEAD_S = 15.0, 300.0
"""Seconds between two signs of life of a claim; seconds without one after which another machine's claim is dead."""


@dataclass(frozen=True)
class Store:
    """A results folder.

    Attributes:
        path: Where it is.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, comparison: Comparison) -> Store:
        """The folder of a comparison: a new one, or the one that holds its earlier cells.

        Raises:
            ValueError: The folder is another comparison's (names the field that differs), or holds something else.
            OSError: It cannot be written.
        """
        store = cls(path)
        if path.exists() and not (path / "config.json").exists() and any(path.glob("[!.]*")):
            raise ValueError(f"{path} is not empty and no results folder: it has no config.json; name another --runs")
        path.mkdir(parents=True, exist_ok=True)
        with store._lock():
            if (path / "config.json").exists():
                comparison = _joined(store.comparison, comparison, path)
            write(path / "config.json", comparison.to_json())
            for name in ("cells", "logs", "work"):
                (path / name).mkdir(exist_ok=True)
            if not any(map(_living, path.glob("cells/*.claim"))):
                sweep(path / "cells")
        return store

    @classmethod
    def open(cls, path: Path) -> Store:
        """An existing folder.

        Raises:
            ValueError: It is no results folder.
        """
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no results folder: it has no config.json")
        return cls(path)

    @property
    def comparison(self) -> Comparison:
        """Everything that was asked for in this folder.

        Raises:
            ValueError: The file is corrupt or not allowed.
        """
        file = self.path / "config.json"
        try:
            return Comparison.from_json(file.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is corrupt or does not fit: {str(error).splitlines()[0]}") from None

    def record(self, cell: Cell) -> Record | None:
        """A cell's record, if it is finished.

        Raises:
            ValueError: It was changed, or is corrupt, or of another cell.
        """
        file = self._file(cell)
        if not file.exists():
            return None
        record = read_record(file)
        if record["cell"] != dataclasses.asdict(cell):
            raise ValueError(f"{file} is the record of another cell, {record['cell']}; delete it to measure this one")
        return record

    def records(self) -> list[Record]:
        """All records, in the order of the comparison's cells.

        Raises:
            ValueError: One of them was changed, or is corrupt.
        """
        found = (self.record(cell) for cell in self.comparison.cells)
        return [record for record in found if record is not None]

    def finished(self, cell: Cell) -> bool:
        """Whether a cell has a record."""
        return self._file(cell).exists()

    def save(self, cell: Cell, record: Record) -> None:
        """Write a cell's record; its checkpoints are no longer needed."""
        content = {"cell": dataclasses.asdict(cell), **record}
        write(self._file(cell), json.dumps({"digest": digest(content), **content}, indent=1))
        shutil.rmtree(self.work(cell), ignore_errors=True)

    def forget(self, cell: Cell) -> None:
        """Remove a cell's record, so that it is measured again."""
        self._file(cell).unlink(missing_ok=True)

    def work(self, cell: Cell) -> Path:
        """Folder for checkpoints of a cell."""
        return self.path / "work" / cell.name

    def log(self, cell: Cell) -> Path:
        """File for what a cell says."""
        return self.path / "logs" / f"{cell.name}.log"

    @contextlib.contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Claim a cell and give it back at the end; False if it is finished, or somebody else's."""
        ours = self._claim(cell)
        over = threading.Event()
        alive = threading.Thread(target=_touch, args=(self._claim_file(cell), over), daemon=True)
        if ours:
            alive.start()
        try:
            yield ours
        finally:
            over.set()
            if ours:
                alive.join()
                self._claim_file(cell).unlink(missing_ok=True)

    def held(self, cell: Cell) -> bool:
        """Whether a living process has claimed a cell."""
        return _living(self._claim_file(cell))

    def _claim(self, cell: Cell) -> bool:
        file = self._claim_file(cell)
        with self._lock():
            if self.finished(cell) or _living(file):
                return False
            file.unlink(missing_ok=True)
            with file.open("x") as created:
                created.write(json.dumps(_self()))
        return True

    def _file(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.json"

    def _claim_file(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.claim"

    def _lock(self) -> FileLock:
        return FileLock(self.path / ".lock")


def read_record(file: Path) -> Record:
    """A record whose content is what was written.

    Raises:
        ValueError: It was changed since, or is corrupt, or missing.
    """
    try:
        record = json.loads(file.read_text())
        said = record.pop("digest")
    except FileNotFoundError:
        raise ValueError(f"record {file} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"record {file} is corrupt; delete it to measure the cell again") from None
    if said != digest(record):
        raise ValueError(f"record {file} was changed after it was written; delete it to measure the cell again")
    return record


def digest(content: Record) -> str:
    """SHA-256 of a record's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _joined(held: Comparison, wanted: Comparison, path: Path) -> Comparison:
    """One comparison with the cells of both.

    Raises:
        ValueError: Their protocols differ.
    """
    # weights may be of tasks that only one of them has
    ours, theirs = (_plain(one.protocol) for one in (wanted, held))
    for name in ours | theirs:
        if name in ours and name in theirs and ours[name] != theirs[name]:
            raise ValueError(
                f"{path} holds a comparison with {name} {theirs[name]}, not {ours[name]}; name another --runs"
            )
    for name in wanted.tasks:
        if name in held.tasks and (name in wanted.files) != (name in held.files):
            raise ValueError(f"{path} holds a comparison with other weights of {name}; name another --runs")
    lists = {name: (*getattr(held, name), *getattr(wanted, name)) for name in LISTS}
    return dataclasses.replace(held, weights=_weights(held, wanted), **lists)


def _weights(held: Comparison, wanted: Comparison) -> tuple[str, ...]:
    """Where the weights of both are; what is wanted now is where they are now."""
    return tuple({entry.partition("=")[0]: entry for entry in (*held.weights, *wanted.weights)}.values())


def _plain(protocol: Record) -> Record:
    """A protocol without nested parts."""
    weights = {f"weights of {task}": sha for task, sha in protocol["weights"].items()}
    return {name: value for name, value in protocol.items() if name != "weights"} | weights


def _self() -> Record:
    """Who claims: this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None if there is none, or no way to know."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _living(file: Path) -> bool:
    """Whether the process of a claim still works on it."""
    try:
        record, age = json.loads(file.read_text()), time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return False
    except ValueError:
        return False  # torn by a kill between creation and writing, which the lock makes one step
    if record["host"] != socket.gethostname():
        return age < DEAD_S
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # a number may belong to another process by now, and a process may have ended without anybody asking how
    return record["started"] == _started(record["pid"]) and not _zombie(record["pid"])


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def _touch(file: Path, over: threading.Event) -> None:
    """Signs of life, until it is over."""
    while not over.wait(TOUCH_S):
        with contextlib.suppress(OSError):
            os.utime(file)
