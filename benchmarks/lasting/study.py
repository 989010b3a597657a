"""The study: its settings, its splits and networks, its folder of records, and who makes which of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from prune_env.config import make_problem, make_task
from prune_env.envs.dynamics import Problem
from prune_env.files import write
from prune_env.pruning.plan import Plan
from prune_env.tasks.dense import recipe
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainSettings
from prune_env.tasks.training.loop import Progress
from prune_env.tasks.weights import write_tensors

Record = dict[str, Any]

REFIT = {"none": "none", "refit": "moments"}
"""Repair of a plan -> refit of `prune_env.config`. Statistics are recalibrated in either case."""


@dataclass(frozen=True)
class Settings:
    """What decides the records of a study.

    There is no option for weights: a network that somebody else trained has seen the images that the truth needs.

    Raises:
        ValueError: A value that is not allowed; names the field.
    """

    task: str = "cifar10-resnet20"
    """Task name."""
    epochs: int | None = 20
    """Epochs of the dense training, on the training split without search and truth images."""
    search_size: int = 2000
    """Images that searches and scores are measured on, held out of the training set."""
    truth_size: int = 5000
    """Further images held out of the training set, which nothing but the truth is measured on."""
    budgets: tuple[float, ...] = (0.5, 0.35)
    """Shares of the macs: all plans at the first, the core of them at every other."""
    evaluations: int = 100
    """Networks that each search measures."""
    fine_tune_epochs: int = 3
    """Epochs of the fine-tuning whose outcome is the truth."""
    fine_tune_lr: float = 0.05
    """Peak learning rate of that fine-tuning."""
    seed: int = 0
    """Seed of splits, of the dense training, of plans and of short trainings."""

    def __post_init__(self) -> None:
        allowed = {
            "search_size": (self.search_size >= 2, "2 or more"),
            "truth_size": (self.truth_size >= 2, "2 or more"),
            "budgets": (len(set(self.budgets)) == len(self.budgets) > 0, "one or more different shares"),
            "fine_tune_epochs": (self.fine_tune_epochs >= 1, "1 or more"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")


@dataclass(frozen=True, eq=False)
class Study:
    """Settings, the folder of the records, and what is made of the settings once for all of them.

    Attributes:
        settings: What decides the records.
        folder: Where they are.
        progress: Told about whatever takes long.
    """

    settings: Settings
    folder: Path
    progress: Progress | None = None
    _problems: dict[tuple[str, str], Problem] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Write down what the folder is for, or refuse a folder that is for something else.

        Raises:
            ValueError: The folder holds records under other settings.
            OSError: It cannot be written.
        """
        file, own = self.folder / "study.json", dataclasses.asdict(self.settings)
        # Plans of one budget know nothing of the others: a study may grow by budgets.
        del own["budgets"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".study.lock"):
            if not file.exists():
                write(file, json.dumps(own, indent=2))
        held = read(file)
        for name in own.keys() | held.keys():
            if own.get(name) != held.get(name):
                raise ValueError(f"{file} has {name} {held.get(name)}, not {own.get(name)}; choose another folder")

    @cached_property
    def _whole(self) -> Task:
        """The task with search and truth images in one split: the dense training sees neither.

        The dense network lies with the records: the same training ends in another network on another machine, and
        records of two networks do not belong together.
        """
        file, settings = self.folder / "dense.safetensors", self.settings
        source: dict[str, Any] = {"weights": file} if file.exists() else {"epochs": settings.epochs}
        held_out = settings.search_size + settings.truth_size
        task = make_task(settings.task, seed=settings.seed, search_size=held_out, progress=self.progress, **source)
        if not file.exists():
            write_tensors(task.network.state_dict(), file)
        return task

    @cached_property
    def task(self) -> Task:
        """The task as searches and scores see it."""
        search = self._whole.search.at(torch.arange(self.settings.search_size))
        # The dense network is measured anew, on what is left of the search split.
        return dataclasses.replace(self._whole, search=search, dense=None)

    @cached_property
    def truth(self) -> Split:
        """Images that neither trainings nor scores see."""
        return self._whole.search.at(torch.arange(self.settings.search_size, len(self._whole.search)))

    def problem(self, importance: str, repair: str, budget: float | None = None) -> Problem:
        """The decision problem under a score and a repair, made once.

        Args:
            importance: Score that ranks the channels of a group.
            repair: A name in `REFIT`.
            budget: Share of the macs; the largest of the study by default.
        """
        if (importance, repair) not in self._problems:
            self._problems[importance, repair] = make_problem(
                self.task, budget=1.0, importance=importance, refit=REFIT[repair], recalibrate=True
            )
        return dataclasses.replace(self._problems[importance, repair], value=budget or max(self.settings.budgets))

    def realised(self, plan: Record) -> nn.Module:
        """The network that a plan's fine-tuning starts from: cut, repaired, recalibrated, ready to be trained."""
        problem = self.problem(plan["importance"], plan["repair"])
        return problem.evaluator.realise(Plan(plan["keep"])).requires_grad_(True)

    def training(self, **changes: object) -> TrainSettings:
        """The task's usual recipe with some changes, on one thread."""
        own = {"seed": self.settings.seed, "threads": 1, **changes}
        return recipe(self.task.data, self.task.network_name, **own)

    def path(self, kind: str, name: str) -> Path:
        """Where a record is."""
        return self.folder / kind / f"{name}.json"

    def plans(self) -> list[Record]:
        """The plans that are made, budget by budget, in the order of their names."""
        budgets = self.settings.budgets
        made = [plan for plan in records(self.folder / "plans") if plan["budget"] in budgets]
        return sorted(made, key=lambda plan: budgets.index(plan["budget"]))


def read(file: Path) -> Record:
    """A record.

    Raises:
        ValueError: It is corrupt.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is corrupt: {error}; remove it to make it anew") from None


def records(folder: Path) -> Iterator[Record]:
    """All records of a folder, in the order of their names."""
    for file in sorted(folder.glob("*.json")):
        yield read(file)


def save(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(record, indent=1))


@dataclass(frozen=True, eq=False)
class Job:
    """A record to make.

    Attributes:
        file: Where it will be.
        done: Whether nothing is missing in it.
        make: Makes and writes what is missing.
    """

    file: Path
    done: Callable[[], bool]
    make: Callable[[], None]


def make_all(jobs: Sequence[Job], *, told: Callable[[int, int, str], None]) -> None:
    """Make all records that are missing, beside other processes that do the same in the same folder.

    A job is claimed by a lock that the system takes back when its holder dies. What another process is making is left
    to it in a first round, waited for in a second one, and made here if it never came.

    Args:
        jobs: In the order in which they are made.
        told: Called as (done, in all, name of what is under way).
    """
    for patience in (0, -1):
        for job in jobs:
            if job.done():
                continue
            told(sum(one.done() for one in jobs), len(jobs), job.file.stem)
            lock = job.file.parent / f".{job.file.stem}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(lock, timeout=patience):
                if not job.done():
                    job.make()
    told(len(jobs), len(jobs), "")


class Stopwatch:
    """CPU and wall seconds between its starts and stops.

    Attributes:
        spent: `cpu_s` (of all threads of this process) and `wall_s`.
    """

    def __init__(self) -> None:
        self.spent = {"cpu_s": 0.0, "wall_s": 0.0}

    def start(self) -> None:
        """Go on."""
        self._begun = {"cpu_s": process_time(), "wall_s": perf_counter()}

    def stop(self) -> None:
        """Pause."""
        for name, now in (("cpu_s", process_time()), ("wall_s", perf_counter())):
            self.spent[name] += now - self._begun[name]


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, with its CPU and wall seconds."""
    watch = Stopwatch()
    watch.start()
    result = call()
    watch.stop()
    return result, {name: round(seconds, 4) for name, seconds in watch.spent.items()}
