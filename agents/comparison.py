"""A comparison: which cells it has, and the one protocol that holds for all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from agents.comparison_methods import DENSE, kind_of, methods_of, parts_of
from agents.config import TrainConfig, known_fields
from agents.runtime_options import RuntimeTrainConfig
from agents.search_config import SearchConfig
from baselines.search import OPTIMISERS
from prune_env.checks import epochs_of
from prune_env.config import make_task
from prune_env.envs.dynamics import check_budgets, open_steps
from prune_env.envs.predictor import Predictor
from prune_env.pruning.tracing import trace
from prune_env.tasks import task as tasks
from prune_env.tasks.dense import parse_name
from prune_env.tasks.task import Task
from prune_env.tasks.training.loop import Progress

LISTS = ("tasks", "methods", "budgets", "seeds")
"""Fields that say which cells there are; the others are the protocol, which one folder has only one of."""


@dataclass(frozen=True, order=True)
class Cell:
    """One row to be measured.

    Attributes:
        task: Task name.
        method: A name of `comparison_methods.KINDS`, perhaps with `@IMPORTANCE`, or `dense`.
        budget: Share of the dense network's resource, or an absolute number; 1 for the dense network.
        seed: Seed of splits, dense training, method and fine-tuning.
    """

    task: str
    method: str
    budget: float
    seed: int

    @property
    def kind(self) -> str:
        """Kind of the row."""
        return kind_of(self.method)

    @property
    def base(self) -> str:
        """The method without the importance that it is given."""
        return parts_of(self.method)[0]

    @property
    def name(self) -> str:
        """Name of its files."""
        aim = "" if self.method == DENSE else f"-{self.budget:g}"
        whole = f"{self.task}-{self.method}{aim}-seed{self.seed}"
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in whole)


@dataclass(frozen=True)
class Comparison:
    """Compare learned policies with heuristics, papers and searches: tasks x methods x budgets x seeds.

    Raises:
        ValueError: A value that is not allowed; names the field, the value and what is.
    """

    tasks: tuple[str, ...] = ("digits-cnn",)
    """Task names, <data>-<network>."""
    weights: tuple[str, ...] = ()
    """Dense weights as TASK=FILE, the file as it is or in $PRUNE_ENV_WEIGHTS; the other tasks' networks are trained."""
    methods: tuple[str, ...] = ("uniform", "error_curves", "provable_filter_pruning", "random_search", "cem", "td3")
    """Names, or heuristics, papers, searches, agents, runtimes; learned and learned:NAME are agents; NAME@IMPORTANCE is
    the method with that importance."""
    budgets: tuple[float, ...] = (0.5,)
    """Shares of the dense network's resource in (0, 1], or absolute numbers above 1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of splits, dense trainings, methods and fine-tunings."""
    budget_resource: str = "macs"
    """What the budgets bound: macs or params."""
    importance: str = "l1"
    """Importance of the methods that do not bring their own."""
    refit: str = "auto"
    """Repair of the methods that do not bring their own: none, moments, sequential or auto."""
    recalibrate: bool = True
    """Re-estimate BatchNorm statistics after the cut."""
    calibration_images: int = 512
    """Training images for recalibration, refit and data-driven importance."""
    evaluations: int = 100
    """Networks that each agent and each search cuts and measures."""
    reward: str = "accuracy"
    """What pays agents and searches; see python -m agents.train --help."""
    short_steps: int = 50
    """Optimiser steps of each short training, if that pays."""
    short_lr: float = 0.02
    """Its peak learning rate."""
    predictor: str | None = None
    """File that the reward predicted reads."""
    fine_tune_epochs: int | float = 0
    """Epochs of training after the cut, the same for every row; below 1 a pass over that share of the images."""
    fine_tune_lr: float = 0.05
    """Peak learning rate of that training."""
    epochs: int | None = None
    """Epochs of a dense training; the task's own by default."""
    normalise: str | None = None
    """How images are normalised, in all tasks: imagenet, cifar, half, none, or six numbers."""
    search_size: int | None = None
    """Images held out of the training split for searches; the data set's own number by default."""
    image_size: int | None = None
    """Side to which image files are scaled, in pixels; 224 by default."""
    schedule: str | None = None
    """Lengths of the trainings of runtime methods: digits, short, hour or paper."""
    threads: int = 1
    """CPU threads of a cell."""
    device: str = "cpu"
    """Where networks run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", methods_of(self.methods))
        for name in (*LISTS, "weights"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in LISTS:
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; at least one value is needed")
        object.__setattr__(self, "fine_tune_epochs", epochs_of("fine_tune_epochs", self.fine_tune_epochs))
        object.__setattr__(self, "budgets", tuple(float(budget) for budget in self.budgets))
        if self.predictor is not None:
            object.__setattr__(self, "predictor", str(Path(self.predictor).expanduser().resolve()))
        for task in self.tasks:
            parse_name(task)
        for entry in self.weights:
            task, _, file = entry.partition("=")
            if not file or task not in self.tasks:
                raise ValueError(f"weights is {entry!r}; TASK=FILE with a task of {', '.join(self.tasks)} is allowed")
        for cell in self.cells:
            self._check(cell)  # what the last cell would refuse is refused before the first

    def _check(self, cell: Cell) -> None:
        """Refuse what a cell's own configuration refuses. Weights need not be there: a report does without."""
        if cell.kind != "runtime":
            self.train_config(cell, file=None)
        elif self.budget_resource != "macs":
            raise ValueError(f"budget_resource is {self.budget_resource!r}; {cell.method} is held to macs only")
        else:
            self.runtime_config(cell, trust=0.5, file=None)

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells: seed by seed, so that what is there early already compares all methods."""
        found: dict[Cell, None] = {}
        for seed in self.seeds:
            found |= dict.fromkeys(Cell(task, DENSE, 1.0, seed) for task in self.tasks)
            wanted = product(self.budgets, self.tasks, self.methods)
            found |= dict.fromkeys(Cell(task, method, budget, seed) for budget, task, method in wanted)
        return list(found)

    @property
    def protocol(self) -> dict[str, Any]:
        """The fields that hold for all cells; of files, what is in them rather than where they are."""
        record = {name: value for name, value in dataclasses.asdict(self).items() if name not in LISTS}
        predictor = None if self.predictor is None else _sha256(Path(self.predictor))
        weights = {task: _sha256(file) for task, file in self.files.items()}
        return record | {"weights": weights, "predictor": predictor}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Task -> file with its dense weights.

        Raises:
            ValueError: A file that is not there.
        """
        return {task: _found(file) for task, _, file in (entry.partition("=") for entry in self.weights)}

    def task(self, cell: Cell, *, progress: Progress | None = None) -> Task:
        """The task of a cell; its dense network is trained if it has to be."""
        options = {name: getattr(self, name) for name in TASKS}
        return make_task(cell.task, weights=self.files.get(cell.task), seed=cell.seed, progress=progress, **options)

    def importance_of(self, cell: Cell) -> str:
        """The importance of a cell whose method does not bring its own."""
        return parts_of(cell.method)[1] or self.importance

    def train_config(self, cell: Cell, *, file: Path | None) -> TrainConfig:
        """The cell as a run of `agents.train`, or of `agents.search_baselines` for a search; `file` has its weights."""
        decided = {name: getattr(self, name) for name in DECIDED}
        options = {
            **decided,
            "task": cell.task,
            "weights": None if file is None else str(file),
            "budget": cell.budget,
            "episodes": self.evaluations,
            "seed": cell.seed,
            "importance": self.importance_of(cell),
        }
        if cell.base in OPTIMISERS:
            return SearchConfig(algorithm=cell.base, **options)
        return TrainConfig.of(cell.base, **options) if cell.kind == "learned" else TrainConfig(**options)

    def runtime_config(self, cell: Cell, *, trust: float, file: Path | None) -> RuntimeTrainConfig:
        """The cell as a run of `agents.train runtime`; `file` has its weights."""
        return RuntimeTrainConfig(
            task=cell.task,
            weights=None if file is None else str(file),
            budget=cell.budget,
            runtime_trust=trust,
            schedule=self.schedule,
            threads=self.threads,
            device=self.device,
            seed=cell.seed,
            **{name: getattr(self, name) for name in TASKS},
        )

    def check_reachable(self) -> None:
        """Refuse budgets that no method can reach, and a predictor that is none. Reads the data, but trains nothing.

        Raises:
            ValueError: Says the smallest share that can be reached, or what is wrong with the predictor.
        """
        if self.predictor is not None:
            Predictor.read(self.predictor)
        for name in self.tasks:
            file = self.files.get(name)
            options = {name: getattr(self, name) for name in TASKS}
            options["epochs"] = None if file else 0
            task = tasks.make_task(name, weights=file, seed=self.seeds[0], **options)
            graph = trace(task.network, task.example)
            steps, allowed = open_steps(graph)
            check_budgets(graph, steps, allowed, resource=self.budget_resource, values=self.budgets)

    def to_json(self) -> str:
        """The comparison as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote.

        Raises:
            ValueError: Not JSON, unknown fields, or values that are not allowed.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("a comparison is a JSON object")
        return known_fields(cls, record)


TASKS = ("epochs", "normalise", "search_size", "image_size")
"""Fields of a task that the comparison decides, under the same name."""

DECIDED = (
    *TASKS, "budget_resource", "reward", "short_steps", "short_lr", "predictor", "refit", "recalibrate",
    "calibration_images", "fine_tune_epochs", "fine_tune_lr", "threads", "device",
)  # fmt: skip
"""Fields of a run that the comparison decides, under the same name."""

DEMONSTRATION = Comparison(
    methods=("uniform", "error_curves", "neuron_merging", "provable_filter_pruning", "random_search", "cem", "learned"),
    budgets=(0.3, 0.15),
    evaluations=60,
    fine_tune_epochs=2,
)
"""What a comparison without arguments shows: heuristics, papers, searches and an agent on digits."""


def _found(file: str) -> Path:
    """A weights file, as it is or in the folder of weights."""
    places = [Path(file).expanduser()]
    if os.environ.get("PRUNE_ENV_WEIGHTS"):
        places.append(Path(os.environ["PRUNE_ENV_WEIGHTS"]) / file)
    for place in places:
        if place.is_file():
            return place.resolve()
    raise ValueError(f"weights {file!r} is no file, neither as it is nor in $PRUNE_ENV_WEIGHTS")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
