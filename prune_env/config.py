"""Configurations as data, and `make`: the only place where names become objects."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_env.checks import check_budget, check_integer, check_name, check_range, is_number
from prune_env.envs import observation
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem, check_budgets, open_steps
from prune_env.number_format import number_format
from prune_env.presets import MEASURES, PRESETS, Bench
from prune_env.pruning import importance as importances
from prune_env.pruning import tracing
from prune_env.pruning.evaluator import Evaluator
from prune_env.pruning.importance import IMPORTANCES
from prune_env.pruning.measure import Measurement, Meter, count_macs, count_params
from prune_env.pruning.moments import REFITS, Moments
from prune_env.pruning.runtime import PooledActivation
from prune_env.task_config import TaskConfig
from prune_env.tasks import task as tasks
from prune_env.tasks.dense import usual_training
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainSettings

RESOURCES = ("macs", "params")
"""What a budget of the env may bound. Latency is measured by a clock, so it is not among them."""

RUNTIME_IMPORTANCES = {"pooled_activation": PooledActivation}
"""Predictors of what a channel is worth for one input."""


@dataclass(frozen=True)
class EnvConfig:
    """One channel pruning environment.

    Raises:
        ValueError: A field of the wrong type or value; names the field, the value and what is allowed.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    """What is pruned."""
    budget: int | float = 0.5
    """Share of the dense network's resource in (0, 1], or an absolute number above 1."""
    budget_resource: str = "macs"
    """What the budget bounds: `macs` or `params`."""
    budget_range: tuple[int | float, int | float] | None = None
    """Lowest and highest share when the budget is drawn anew for each episode."""
    hard_budget: bool = True
    """Move actions so that every episode ends inside the budget; False leaves the budget to the reward."""
    importance: str = "l1"
    """Static importance: which channels a group keeps."""
    runtime_importance: str = "pooled_activation"
    """Predictor of what a channel is worth for one input, shown in the observation."""
    reward: str = "accuracy"
    """A name in `PRESETS`: how an episode's network is measured, and what that earns."""
    short_steps: int = 50
    """Optimiser steps of each short training."""
    short_lr: int | float = 0.02
    """Its peak learning rate."""
    predictor: str | None = None
    """File with the coefficients of the reward `predicted`, from `python -m benchmarks.lasting --stage predictors`."""
    recalibrate: bool = True
    """Re-estimate BatchNorm statistics after the cut."""
    refit: str = "auto"
    """Refit of the layers behind a cut: `none`, `moments`, `sequential`, or `auto` (from moments where they exist)."""
    min_channels: int = 1
    """Fewest channels that a group may keep."""
    min_keep: int | float = 0.0
    """Least share of its channels that a group may keep."""
    round_to: int = 1
    """Kept counts are multiples of it, or the whole group."""
    leave: tuple[str, ...] = ()
    """Groups (or layers that write them) to keep whole."""
    calibration_images: int = 512
    """Training images for recalibration, refit and data-driven importance."""
    device: str = "cpu"
    """Where networks run."""

    def __post_init__(self) -> None:
        check_name("budget_resource", self.budget_resource, RESOURCES)
        check_name("importance", self.importance, IMPORTANCES)
        check_name("runtime_importance", self.runtime_importance, RUNTIME_IMPORTANCES)
        check_name("reward", self.reward, PRESETS)
        check_name("refit", self.refit, ("auto", *REFITS))
        for name, least in (("min_channels", 1), ("round_to", 1), ("calibration_images", 2), ("short_steps", 1)):
            check_integer(name, getattr(self, name), least=least)
        if not is_number(self.min_keep) or not 0 <= self.min_keep <= 1:
            raise ValueError(f"min_keep is {self.min_keep!r}; a share in [0, 1] is allowed")
        if not is_number(self.short_lr) or self.short_lr <= 0:
            raise ValueError(f"short_lr is {self.short_lr!r}; a finite number above 0 is allowed")
        if (self.predictor is None) == (self.measure == "predicted"):
            what = "a file for the reward 'predicted', and None for all others, is allowed"
            raise ValueError(f"predictor is {self.predictor!r} with the reward {self.reward!r}; {what}")
        for name in ("recalibrate", "hard_budget"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; True or False is allowed")
        if not isinstance(self.leave, tuple) or not all(isinstance(name, str) for name in self.leave):
            raise ValueError(f"leave is {self.leave!r}; a tuple of group names is allowed")
        check_budget(self.budget)
        check_range(self.budget_range)

    @property
    def measure(self) -> str:
        """How an episode's network is measured, a name in `MEASURES`."""
        return PRESETS[self.reward].measure

    @property
    def chosen_refit(self) -> str:
        """The refit that is really done."""
        return "moments" if self.refit == "auto" else self.refit

    @classmethod
    def of(cls, task: str = "digits-cnn", **options: Any) -> EnvConfig:
        """A config from one flat set of fields of `EnvConfig` and `TaskConfig`.

        Raises:
            ValueError: An unknown field (names the closest), or a value that is not allowed.
        """
        inner = {f.name for f in dataclasses.fields(TaskConfig)}
        outer = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            check_name("option", name, sorted(inner | outer))
        own = {name: value for name, value in options.items() if name in inner}
        rest = {name: value for name, value in options.items() if name not in inner}
        return cls(TaskConfig(task, **own), **_tuples(rest))

    def to_json(self) -> str:
        """The config as JSON; `from_json` gives an equal one back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> EnvConfig:
        """The config that `to_json` wrote.

        Raises:
            ValueError: Not JSON, not an object, or fields that are unknown or not allowed.
        """
        record = json.loads(text)
        if not isinstance(record, dict) or not isinstance(record.get("task"), dict):
            raise ValueError("a config is a JSON object with an object named 'task'")
        return cls.of(**{**record.pop("task"), **record})


def make_task(name: str, **options: Any) -> Task:
    """A task with its dense network measured on the search split.

    Args:
        name: `<data>-<network>`.
        **options: As for `prune_env.tasks.task.make_task`: `network`, `weights`, `normalise`, `seed`, `epochs`,
            `search_size`, `image_size`, `root`, `progress`.

    Raises:
        ValueError: An unknown name, weights that do not fit, or a network whose outputs are not finite.
    """
    task = tasks.make_task(name, **options)
    meter = Meter(*_everything(task.search), dtype=number_format(task.network, task.example))
    return dataclasses.replace(task, dense=_dense(task.network, meter, example=task.example, name=task.name))


def make(config: EnvConfig, *, progress: Any = None) -> Problem:
    """Build what a config describes; trains the dense network if it has to.

    Args:
        config: The config.
        progress: Told about a dense training, see `make_task`.

    Raises:
        ValueError: Anything in the config that cannot be built, in one line.
    """
    options = dataclasses.asdict(config.task)
    return build(Material.of(tasks.make_task(options.pop("task"), progress=progress, **options), config), config)


def make_env(
    task: str = "digits-cnn", *, problem: Problem | None = None, render_mode: str | None = None, **options: Any
) -> ChannelPruningEnv:
    """`prune_env/ChannelPruning-v0`, from names or from a ready problem: what `gymnasium.make` calls.

    Args:
        task: Task name, `<data>-<network>`.
        problem: A ready problem; then no options are allowed beside it, and `task` is not read.
        render_mode: `ansi`, `rgb_array` or None.
        **options: Fields of `EnvConfig` and `TaskConfig`.

    Raises:
        ValueError: An unknown option or a value that is not allowed.
    """
    if problem is not None and options:
        raise ValueError(f"a ready problem has its own settings; {sorted(options)} cannot be given beside it")
    return ChannelPruningEnv(problem or make(EnvConfig.of(task, **options)), render_mode=render_mode)


def make_problem(task: Task, **options: Any) -> Problem:
    """The decision problem of a task object.

    Args:
        task: From `make_task`.
        **options: Fields of `EnvConfig`.

    Raises:
        ValueError: An unknown field or a value that is not allowed.
    """
    config = _config(options)
    return build(Material.of(task, config), config)


def problem_from(
    network: nn.Module,
    *,
    calibration: tuple[Tensor, Tensor],
    search: tuple[Tensor, Tensor],
    name: str = "network",
    **options: Any,
) -> Problem:
    """The decision problem of a network and data of your own.

    Args:
        network: Any torch classifier that can be traced; it is copied.
        calibration: Inputs as the network reads them, `[n, ...]` float32, and their classes, `[n]` int64, from the
            training set. All are used.
        search: The same, held out of the training set: what plans are measured on.
        name: A title.
        **options: Fields of `EnvConfig`.

    Raises:
        ValueError: An unknown field, a value that is not allowed, or a network without a prunable group.
    """
    return build(Material(name, network, calibration, search), _config(options))


@dataclass(frozen=True, eq=False)
class Material:
    """What a problem is built from.

    Attributes:
        name: A title.
        network: The dense network.
        calibration: Training inputs and classes.
        search: Inputs and classes that plans are measured on.
        dense: The dense network's measurement, if it is known.
        train: Images for short trainings.
        training: Recipe of these.
    """

    name: str
    network: nn.Module
    calibration: tuple[Tensor, Tensor]
    search: tuple[Tensor, Tensor]
    dense: Measurement | None = None
    train: Split | None = None
    training: TrainSettings | None = None

    @classmethod
    def of(cls, task: Task, config: EnvConfig) -> Material:
        """What a task gives to a problem."""
        calibration, search = task.calibration(config.calibration_images), _everything(task.search)
        training = usual_training(task.data, task.network_name, seed=task.seed)
        dense = task.dense if isinstance(task.dense, Measurement) else None  # a task knows nothing of measurements
        return cls(task.name, task.network, calibration, search, dense, task.train, training)


def build(material: Material, config: EnvConfig) -> Problem:
    """A problem from its material and the fields of a config (of its `task`, only the seed)."""
    network = copy.deepcopy(material.network).to(config.device).eval()
    images, labels = (tensor.to(config.device) for tensor in material.calibration)
    graph = tracing.trace(network, images[:1])
    limits = {name: getattr(config, name) for name in ("min_channels", "min_keep", "round_to", "leave")}
    steps, allowed = open_steps(graph, **limits)
    # Here already, because what follows takes long on a large network.
    values = (config.budget, *(config.budget_range or ()))
    check_budgets(graph, steps, allowed, resource=config.budget_resource, values=values)
    meter = Meter(*material.search, dtype=number_format(network, images), device=config.device)
    dense = material.dense or _dense(network, meter, example=images[:1], name=material.name)
    wanted = {name: getattr(config, name) for name in ("short_steps", "short_lr", "predictor", "recalibrate", "device")}
    data = {"name": material.name, "train": material.train, "training": material.training}
    judge = MEASURES[config.measure](
        Bench(graph=graph, steps=steps, meter=meter, refit=config.chosen_refit, **data, **wanted)
    )
    moments = Moments.collect(network, graph, images)
    seed = config.task.seed
    scores = importances.score(config.importance, network, graph, (images, labels), moments=moments, seed=seed)
    curves = {
        group.name: moments.error_curve(
            network, group, scores=torch.as_tensor(scores[group.name]), points=observation.KNOWN["error_curve"]
        )
        for group in graph.groups
    }
    return Problem(
        name=material.name,
        graph=graph,
        resource=config.budget_resource,
        steps=steps,
        allowed=allowed,
        dense=dense,
        scores=_arrays(scores),
        fields=observation.describe(
            graph,
            steps,
            scores=_arrays(scores),
            activations=_arrays(RUNTIME_IMPORTANCES[config.runtime_importance]().collect(network, graph, images)),
            curves=curves,
        ),
        evaluator=Evaluator(
            network,
            graph,
            meter,
            calibration=images,
            recalibrate=config.recalibrate,
            refit=config.chosen_refit,
            moments=moments,
            judge=judge,
            device=config.device,
        ),
        reward=PRESETS[config.reward].reward,
        value=config.budget,
        span=config.budget_range,
        hard=config.hard_budget,
    )


def _config(options: Mapping[str, Any]) -> EnvConfig:
    """A config from fields of `EnvConfig` alone."""
    known = [f.name for f in dataclasses.fields(EnvConfig) if f.name != "task"]
    for name in options:
        check_name("option", name, known)
    return EnvConfig(**_tuples(options))


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tuples for the lists that JSON and command lines hand over."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _everything(split: Split) -> tuple[Tensor, Tensor]:
    """All images of a split, normalised, and their labels."""
    return split.take(len(split))


def _arrays(scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores of any kind as float64 arrays."""
    return {name: torch.as_tensor(score).detach().double().cpu().numpy() for name, score in scores.items()}


def _dense(network: nn.Module, meter: Meter, *, example: Tensor, name: str) -> Measurement:
    """The dense network on the search split.

    Raises:
        ValueError: Its outputs are not finite.
    """
    accuracy, loss = meter.accuracy_and_loss(network)
    if not math.isfinite(loss):
        raise ValueError(f"the dense network of {name} has loss {loss} on the search split; check its weights")
    return Measurement(accuracy, loss, count_macs(network, example), count_params(network))
