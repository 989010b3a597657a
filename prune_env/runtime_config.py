"""Runtime pruning from names: the configuration of `prune_env/RuntimePruning-v0`, and what it builds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from prune_env.checks import check_budget, check_integer, check_name, check_range
from prune_env.config import _tuples
from prune_env.envs.runtime_dynamics import RuntimeProblem, Scale
from prune_env.envs.runtime_pruning import RuntimePruningEnv, RuntimePruningVectorEnv
from prune_env.gates import prepared
from prune_env.number_format import number_format
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.gating.static import STATIC_IMPORTANCES
from prune_env.pruning.gating.tradeoff import check_trust
from prune_env.pruning.gating.walk import Walker
from prune_env.pruning.measure import prepare_images
from prune_env.task_config import TaskConfig
from prune_env.tasks import task as tasks
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task

SPLITS = ("train", "search")
"""Where episodes may take their images from; the test split is out of reach."""

MOST_IMAGES = 20_000
"""Images that are kept ready for episodes."""

SCALE_IMAGES = 128
"""Images from which the scale of observations is taken."""


@dataclass(frozen=True)
class RuntimeConfig:
    """One runtime pruning environment.

    Raises:
        ValueError: A field of the wrong type or value; names the field, the value and what is allowed.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    """What is pruned."""
    budget: int | float = 0.5
    """Share of the dense network's macs in (0, 1] that images may cost in the mean, or a number of macs above 1."""
    budget_range: tuple[int | float, int | float] | None = None
    """Lowest and highest share when the budget is drawn anew for each batch."""
    runtime_trust: int | float = 0.5
    """Trust in the runtime decision (R_r of the paper): 1 is runtime pruning alone, 0 static pruning alone."""
    static_importance: str = "vector"
    """Trained static importance: `vector` or `filters`."""
    min_keep: int | float = 0.1
    """Least share of a layer's channels that an action can ask for."""
    gate_epochs: int | None = None
    """Epochs for which predictors are trained before the first episode; None takes the data set's own."""
    images: str = "train"
    """Split that episodes draw their images from: `train` or `search`."""
    device: str = "cpu"
    """Where networks run."""

    def __post_init__(self) -> None:
        check_name("static_importance", self.static_importance, STATIC_IMPORTANCES)
        check_name("images", self.images, SPLITS)
        check_budget(self.budget)
        check_range(self.budget_range)
        check_trust(self.runtime_trust)
        if isinstance(self.min_keep, bool) or not 0 < self.min_keep <= 1:
            raise ValueError(f"min_keep is {self.min_keep!r}; a share in (0, 1] is allowed")
        if self.gate_epochs is not None:
            check_integer("gate_epochs", self.gate_epochs, least=0)

    @classmethod
    def of(cls, task: str = "digits-cnn", **options: Any) -> RuntimeConfig:
        """A config from one flat set of fields of `RuntimeConfig` and `TaskConfig`.

        Raises:
            ValueError: An unknown field (names the closest), or a value that is not allowed.
        """
        inner = {f.name for f in dataclasses.fields(TaskConfig)}
        outer = {f.name for f in dataclasses.fields(cls)} - {"task"}
        for name in options:
            check_name("option", name, sorted(inner | outer))
        own = {name: value for name, value in options.items() if name in inner}
        rest = {name: value for name, value in options.items() if name not in inner}
        return cls(TaskConfig(task, **own), **_tuples(rest))


def make_runtime_problem(
    task: Task, *, gated: GatedNetwork | None = None, progress: Any = None, **options: Any
) -> RuntimeProblem:
    """The decision problem of a task object.

    Args:
        task: From `make_task`.
        gated: Its network with gates; without it they are attached and trained (or taken from the cache).
        progress: Told about a training.
        **options: Fields of `RuntimeConfig`.

    Raises:
        ValueError: An unknown field, a value that is not allowed, or a network without a gateable layer.
    """
    config = dataclasses.replace(RuntimeConfig.of(**options))
    if gated is None:
        gated = prepared(
            task, static=config.static_importance, epochs=config.gate_epochs, seed=task.seed, progress=progress
        )
    return problem_of(task, gated, config)


def problem_of(task: Task, gated: GatedNetwork, config: RuntimeConfig, **changes: Any) -> RuntimeProblem:
    """A problem from a gated network and a config; `changes` are further fields of `RuntimeProblem`."""
    split: Split = {"train": task.train, "search": task.search}[config.images]
    gated = gated.to(config.device).to(memory_format=torch.channels_last).eval()
    images, labels = split.take(min(len(split), MOST_IMAGES))
    dtype = number_format(gated, images)
    images = prepare_images(images, device=config.device, dtype=dtype)
    return RuntimeProblem(
        name=task.name,
        gated=gated,
        images=images,
        labels=labels.to(config.device),
        scale=Scale.of(Walker(gated), images[:SCALE_IMAGES], dtype),
        value=config.budget,
        span=config.budget_range,
        trust=float(config.runtime_trust),
        min_keep=float(config.min_keep),
        dtype=dtype,
        **changes,
    )


def make_runtime(config: RuntimeConfig, *, progress: Any = None) -> RuntimeProblem:
    """Build what a config describes; trains dense network and gates if it has to.

    Raises:
        ValueError: Anything in the config that cannot be built, in one line.
    """
    options = dataclasses.asdict(config.task)
    task = tasks.make_task(options.pop("task"), progress=progress, **options)
    gated = prepared(
        task,
        static=config.static_importance,
        epochs=config.gate_epochs,
        seed=config.task.seed,
        progress=progress,
        root=config.task.root,
    )
    return problem_of(task, gated, config)


def make_runtime_vec(
    task: str = "digits-cnn",
    *,
    num_envs: int = 128,
    problem: RuntimeProblem | None = None,
    render_mode: str | None = None,
    **options: Any,
) -> RuntimePruningVectorEnv:
    """`prune_env/RuntimePruning-v0` for a batch of images: what `gymnasium.make_vec` calls.

    Args:
        task: Task name, `<data>-<network>`.
        num_envs: Images that walk together.
        problem: A ready problem; then no options are allowed beside it, and `task` is not read.
        render_mode: None.
        **options: Fields of `RuntimeConfig` and `TaskConfig`.

    Raises:
        ValueError: An unknown option or a value that is not allowed.
    """
    return RuntimePruningVectorEnv(_ready(task, problem, options), num_envs=num_envs, render_mode=render_mode)


def make_runtime_env(
    task: str = "digits-cnn", *, problem: RuntimeProblem | None = None, render_mode: str | None = None, **options: Any
) -> RuntimePruningEnv:
    """`prune_env/RuntimePruning-v0` for one image at a time: what `gymnasium.make` calls.

    Args:
        task: Task name, `<data>-<network>`.
        problem: A ready problem; then no options are allowed beside it, and `task` is not read.
        render_mode: None.
        **options: Fields of `RuntimeConfig` and `TaskConfig`.

    Raises:
        ValueError: An unknown option or a value that is not allowed.
    """
    return RuntimePruningEnv(_ready(task, problem, options), render_mode=render_mode)


def _ready(task: str, problem: RuntimeProblem | None, options: dict[str, Any]) -> RuntimeProblem:
    if problem is not None and options:
        raise ValueError(f"a ready problem has its own settings; {sorted(options)} cannot be given beside it")
    return problem or make_runtime(RuntimeConfig.of(task, **options))
