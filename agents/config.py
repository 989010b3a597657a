"""The configuration of a training run: one frozen dataclass, from which the command line is derived."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from agents.algorithms import ALGORITHMS
from baselines.shaping import Shaping
from prune_env.checks import check_integer, check_name, epochs_of
from prune_env.config import EnvConfig
from prune_env.task_config import TaskConfig
from prune_env.tasks.dense import parse_name


@dataclass(frozen=True)
class TrainConfig:
    """Learn per-group keep ratios for one network at one budget.

    Raises:
        ValueError: A value that is not allowed; names the field, the value and what is.
    """

    program: ClassVar[str] = "agents.train"
    """The module that runs and resumes it."""

    task: str = "digits-cnn"
    """Task name, <data>-<network>."""
    network: str | None = None
    """Other network than the task's: a zoo name, torchvision:NAME or package.module:factory."""
    weights: str | None = None
    """File with the dense weights; without it the network is trained, or loaded from the cache."""
    normalise: str | None = None
    """How images are normalised: imagenet, cifar, half, none, or six numbers."""
    epochs: int | None = None
    """Epochs of the dense training; the task's own by default."""
    search_size: int | None = None
    """Images held out of the training split for the search; the data set's own number by default."""
    image_size: int | None = None
    """Side to which image files are scaled, in pixels; 224 by default."""
    budget: float = 0.5
    """Share of the dense network's resource in (0, 1], or an absolute number above 1."""
    budget_resource: str = "macs"
    """What the budget bounds: macs or params."""
    hard_budget: bool = True
    """Every episode ends inside the budget; otherwise the budget is left to the reward."""
    importance: str = "l1"
    """Static importance: which channels a group keeps."""
    reward: str = "accuracy"
    """What pays. Without training: accuracy (or instant), accuracy_guaranteed, exponential_penalty; after fine-tuning:
    short-training or predicted."""
    short_steps: int = 50
    """Optimiser steps of each short training."""
    short_lr: float = 0.02
    """Its peak learning rate."""
    predictor: str | None = None
    """File that the reward predicted reads, from python -m benchmarks.lasting --stage predictors."""
    recalibrate: bool = True
    """Re-estimate BatchNorm statistics after the cut."""
    refit: str = "auto"
    """Refit of the layers behind a cut: none, moments, sequential or auto."""
    min_channels: int = 1
    """Fewest channels that a group may keep."""
    min_keep: float = 0.0
    """Least share of its channels that a group may keep."""
    round_to: int = 1
    """Kept counts are multiples of it, or the whole group."""
    leave: tuple[str, ...] = ()
    """Groups (or layers that write them) to keep whole."""
    calibration_images: int = 512
    """Training images for recalibration, refit and data-driven importance."""
    algorithm: str = "td3"
    """Who learns: ddpg, td3, sac, tqc or ppo; td3_surrogate, which shares a run with a Gaussian process; amc (scaled
    down) or amc_paper, with defaults of their own."""
    shape: str | None = None
    """Shaper, NAME[:WEIGHT[:EPISODES]]: a paper's potential on the way to the reward, in units of what is learned from;
    with EPISODES it fades to zero over so many. Names: importance, polarization, scop, provable_filter_pruning,
    directional_pruning, neuron_merging, channel_gating."""
    episodes: int = 200
    """Networks that are cut and measured."""
    warm_up: int | None = None
    """Episodes before the learner acts itself; a fifth of all by default."""
    random_plans: int | None = None
    """Random feasible plans of which the best is the row `random` of the report, each a measured network; as many as
    episodes by default, 0 for no such row."""
    fine_tune_epochs: int | float = 0
    """Epochs of training, at the end, for the networks of all plans but the policy's; below 1 a pass over that share of
    the training images."""
    fine_tune_lr: float = 0.05
    """Peak learning rate of that training."""
    workers: int = 1
    """Processes that play episodes at the same time."""
    chunk: int = 10
    """Episodes between two checkpoints, rounded up to whole rounds of the workers."""
    threads: int | None = None
    """CPU threads of the main process; torch's default by default, and recorded."""
    device: str = "cpu"
    """Where the pruned networks run."""
    seed: int = 0
    """Seed of the splits, of a dense training, of the random plans and of the agent."""
    seeds: tuple[int, ...] = ()
    """Seeds of several runs after one another, each in a folder of its own; replaces `seed`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave", tuple(self.leave))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        for seed in self.seeds:
            check_integer("seeds", seed, least=0)
        self.check_algorithm()
        object.__setattr__(self, "fine_tune_epochs", epochs_of("fine_tune_epochs", self.fine_tune_epochs))
        for name, least in (("episodes", 1), ("workers", 1), ("chunk", 1)):
            check_integer(name, getattr(self, name), least=least)
        for name, least in (("warm_up", 0), ("random_plans", 0), ("threads", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=least)
        if not 0 < self.fine_tune_lr < float("inf"):
            raise ValueError(f"fine_tune_lr is {self.fine_tune_lr}; a finite number above 0 is allowed")
        self.shaping()
        self.env()  # every field of the environment is checked there

    @classmethod
    def of(cls, algorithm: str, **options: Any) -> TrainConfig:
        """A config with an algorithm's own defaults.

        Raises:
            ValueError: An unknown algorithm, or a value that is not allowed.
        """
        check_name("algorithm", algorithm, ALGORITHMS)
        return cls(**{"algorithm": algorithm, **ALGORITHMS[algorithm].defaults, **options})

    def check_algorithm(self) -> None:
        """Refuse an unknown algorithm.

        Raises:
            ValueError: Names the closest.
        """
        check_name("algorithm", self.algorithm, ALGORITHMS)

    def env(self) -> EnvConfig:
        """The environment's part."""
        names = {f.name for f in dataclasses.fields(self)}
        outer = {f.name for f in dataclasses.fields(EnvConfig)} & names - {"task"}
        inner = {f.name for f in dataclasses.fields(TaskConfig)} & names
        return EnvConfig.of(**{name: getattr(self, name) for name in sorted(outer | inner)})

    def shaping(self) -> Shaping | None:
        """The shaper, if there is one.

        Raises:
            ValueError: An unknown name (says the closest), or a number that is not allowed.
        """
        return None if self.shape is None else Shaping.parse(self.shape)

    @property
    def guided(self) -> int:
        """Episodes of the warm-up."""
        return min(self.episodes, max(self.episodes // 5, 1) if self.warm_up is None else self.warm_up)

    @property
    def drawn(self) -> int:
        """Random plans of the report."""
        return self.episodes if self.random_plans is None else self.random_plans

    @property
    def name(self) -> str:
        """Name of the run folder."""
        whole = self.task if self.network is None else f"{self.task}-{self.network}"
        who = self.algorithm if self.shape is None else f"{self.algorithm}-shape-{self.shape}"
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{whole}-{who}")
        paid = f"{plain}-{self.importance}{self.paid}"
        return f"{paid}-{self.budget_resource}{self.budget:g}-seed{self.seed}"

    @property
    def paid(self) -> str:
        """How episodes are measured, as a part of the name; nothing where it is at once."""
        named = {"short-training": f"-short-training{self.short_steps}-lr{self.short_lr:g}", "predicted": "-predicted"}
        return named.get(self.env().measure, "")

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The config that `to_json` wrote.

        Raises:
            ValueError: Not JSON, unknown fields, or values that are not allowed.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("a run's config is a JSON object")
        return known_fields(cls, record)


Config = TypeVar("Config", bound=TrainConfig)
Record = TypeVar("Record")


def known_fields(kind: type[Record], record: dict[str, Any]) -> Record:
    """A dataclass from what JSON has kept of it.

    Raises:
        ValueError: A field that it does not have (names the closest), or a value that is not allowed.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in record:
        check_name("field", name, known)
    # JSON has lists only
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def resolved(config: Config) -> Config:
    """The config with whole paths, so that it means the same from everywhere."""
    files = {name: getattr(config, name) for name in ("weights", "predictor")}
    whole = {name: str(Path(file).expanduser().resolve()) for name, file in files.items() if file is not None}
    return dataclasses.replace(config, **whole)


def own_settings(config: TrainConfig, *, decided: Collection[str]) -> dict[str, Any]:
    """Fields in which an algorithm differs from the others, of those that whoever compares them did not decide."""
    usual = type(config)()
    names = [field.name for field in dataclasses.fields(config) if field.name not in decided]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(usual, name)}


DEMONSTRATION = TrainConfig(budget=0.15, episodes=150, seeds=(0, 1, 2), threads=1)
"""What a run without arguments shows: a digits network at a budget at which the uniform plan visibly loses."""


def own_package(task: str, network: str | None) -> tuple[str, ...]:
    """The package of a network of one's own, whose classes a stored network is made of.

    Args:
        task: Task name.
        network: Other network than the task's.
    """
    _, name = parse_name(task, network)
    own = ":" in name and not name.startswith("torchvision:")
    return (name.split(":")[0].split(".")[0],) if own else ()
