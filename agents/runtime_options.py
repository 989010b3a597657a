"""The configuration of a runtime training: one frozen dataclass, and the schedules that presets name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from agents.config import known_fields
from agents.runtime_agent import PpoSettings
from prune_env.checks import check_name
from prune_env.config import make_task
from prune_env.gates import LEARNING_RATE
from prune_env.runtime_config import RuntimeConfig
from prune_env.task_config import TaskConfig
from prune_env.tasks.task import Task


@dataclass(frozen=True)
class Schedule:
    """How long each stage of the core paper's training lasts.

    Attributes:
        gates: Epochs of network and runtime predictors, every channel active (the paper's stage b).
        scores: Epochs with the static scores released, every channel active (stage c).
        rounds: Alternations of network and agents (stage d).
        rollouts: Rollouts of each agent in a round; one is `images_at_once` images.
        network: Epochs of the network in a round, agents frozen at their means.
        final: Epochs of the network after the last round.
        ppo: Settings of both agents.
    """

    gates: int
    scores: int
    rounds: int
    rollouts: int
    network: int
    final: int
    ppo: PpoSettings = dataclasses.field(default_factory=PpoSettings)


SCHEDULES = {
    "digits": Schedule(gates=4, scores=4, rounds=4, rollouts=150, network=4, final=12),
    # Predictors and static scores are released together.
    "short": Schedule(gates=0, scores=1, rounds=1, rollouts=200, network=1, final=3),
    "hour": Schedule(gates=1, scores=1, rounds=2, rollouts=200, network=1, final=18),
    # Section 4.1 and the official code: 32 rounds of 4 epochs of both agents (352 rollouts an epoch on CIFAR-10) and 2
    # of the network. How long stages b and c last is not published; the one long training that the code inserts at
    # round 10 (200 epochs) is the final one here.
    "paper": Schedule(
        gates=10,
        scores=10,
        rounds=32,
        rollouts=1408,
        network=2,
        final=200,
        ppo=PpoSettings(lr=1e-6, log_std=-4.0, epochs=1, minibatch=64, self_critical=False),
    ),
}
"""Schedules by name. `hour` ends within an hour for M-CifarNet on two cores, `short` in a quarter of it."""


@dataclass(frozen=True)
class RuntimeTrainConfig:
    """Learn runtime and static channel pruning: predictors, agents and network in turns.

    Raises:
        ValueError: A value that is not allowed; names the field, the value and what is.
    """

    program: ClassVar[str] = "agents.train runtime"

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
    """Share of the dense macs in (0, 1] that images may cost in the mean, or a number of macs above 1."""
    keep: float | None = None
    """In place of the budget: the share which, kept in every layer, costs the budget (the paper's "sparsity")."""
    runtime_trust: float = 0.5
    """Trust in the runtime decision: 1 is runtime pruning alone, 0 static pruning alone."""
    budget_per: str = "mean"
    """Whom the reward holds to the budget: the mean over images (a price on macs), or each image (the paper's)."""
    static_importance: str = "vector"
    """Trained static importance: vector or filters."""
    schedule: str | None = None
    """Lengths of the stages: digits, short, hour or paper; digits for digits, else hour by default."""
    lr: float = LEARNING_RATE
    """Peak learning rate of each training of the network."""
    budget_spread: float = 0.2
    """Agents are trained on budgets drawn from budget * (1 +- spread), so that one policy serves several."""
    network_spread: float = 0.0
    """The network likewise, from its first pruned epoch on, so that it serves several; the paper's learns one."""
    images_at_once: int = 128
    """Images that walk through the network together."""
    static_batches: int = 8
    """Parts of them that each get a static decision of their own while the static agent learns."""
    threads: int | None = None
    """CPU threads; torch's default by default, and recorded."""
    device: str = "cpu"
    """Where networks run."""
    seed: int = 0
    """Seed of the splits, of trainings and of the agents."""

    def __post_init__(self) -> None:
        if self.schedule is not None:
            check_name("schedule", self.schedule, SCHEDULES)
        check_name("budget_per", self.budget_per, ("mean", "image"))
        if self.keep is not None and not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise ValueError(f"keep is {self.keep!r}; a share in (0, 1] is allowed")
        for name in ("budget_spread", "network_spread"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; a share in [0, 1) is allowed")
        for name in ("images_at_once", "static_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; an integer of at least 1 is allowed")
        if self.images_at_once % self.static_batches:
            raise ValueError(
                f"static_batches is {self.static_batches}; a divisor of images_at_once ({self.images_at_once}) "
                "is allowed"
            )
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}; a finite number above 0 is allowed")
        self.env()  # every field of the environment is checked there

    def env(self) -> RuntimeConfig:
        """The environment's part."""
        of_task = {f.name for f in dataclasses.fields(TaskConfig)} & {f.name for f in dataclasses.fields(self)}
        names = of_task - {"task"} | {"runtime_trust", "static_importance"}
        # What a share costs is known only once there is a network.
        budget = self.budget if self.keep is None else 1.0
        return RuntimeConfig.of(
            self.task, device=self.device, budget=budget, **{name: getattr(self, name) for name in names}
        )

    @property
    def stages(self) -> Schedule:
        """The schedule that holds."""
        own = "digits" if self.task.startswith("digits") else "hour"
        return SCHEDULES[self.schedule or own]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        whole = self.task if self.network is None else f"{self.task}-{self.network}"
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in whole)
        aim = f"macs{self.budget:g}" if self.keep is None else f"keep{self.keep:g}"
        return f"runtime-{plain}-{aim}-trust{self.runtime_trust:g}-seed{self.seed}"

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps({"kind": "runtime", **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RuntimeTrainConfig:
        """The config that `to_json` wrote.

        Raises:
            ValueError: Not JSON, not of a runtime run, unknown fields, or values that are not allowed.
        """
        record = json.loads(text)
        if not isinstance(record, dict) or record.pop("kind", None) != "runtime":
            raise ValueError('the config of a runtime run is a JSON object with "kind": "runtime"')
        return known_fields(cls, record)


def network_epochs(config: RuntimeTrainConfig) -> int:
    """Epochs that the network is trained for in all stages of a run."""
    plan = config.stages
    return plan.gates + plan.scores + plan.rounds * plan.network + plan.final


def task_of(config: RuntimeTrainConfig, *, progress: Any = None) -> Task:
    """The task of a run, with its dense measurement."""
    options = dataclasses.asdict(config.env().task)
    return make_task(options.pop("task"), progress=progress, **options)


def is_runtime(path: Path) -> bool:
    """Whether a run folder is that of a runtime training."""
    try:
        record = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("kind") == "runtime"
