"""Channel pruning decided layer by layer by learning: environments, surgery and measures for any torch network.

Importing this package registers its environments; everything else is loaded on first use, because torch and the
tracer take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import gymnasium

PUBLIC = {
    "Budget": "prune_env.pruning.measure",
    "ChannelPruningEnv": "prune_env.envs.channel_pruning",
    "EnvConfig": "prune_env.config",
    "GatedNetwork": "prune_env.pruning.gating.network",
    "Evaluator": "prune_env.pruning.evaluator",
    "Measurement": "prune_env.pruning.measure",
    "Moments": "prune_env.pruning.moments",
    "Plan": "prune_env.pruning.plan",
    "Problem": "prune_env.envs.dynamics",
    "RuntimeConfig": "prune_env.runtime_config",
    "RuntimeProblem": "prune_env.envs.runtime_dynamics",
    "RuntimePruningVectorEnv": "prune_env.envs.runtime_pruning",
    "Task": "prune_env.tasks.task",
    "TaskConfig": "prune_env.task_config",
    "attach": "prune_env.pruning.gating.network",
    "count_macs": "prune_env.pruning.measure",
    "count_params": "prune_env.pruning.measure",
    "cut": "prune_env.pruning.surgery",
    "load": "prune_env.pruning.archive",
    "make": "prune_env.config",
    "make_env": "prune_env.config",
    "make_problem": "prune_env.config",
    "make_runtime_problem": "prune_env.runtime_config",
    "make_task": "prune_env.config",
    "problem_from": "prune_env.config",
    "masked": "prune_env.pruning.surgery",
    "measure_latency": "prune_env.pruning.measure",
    "save": "prune_env.pruning.archive",
    "score": "prune_env.pruning.importance",
    "trace": "prune_env.pruning.tracing",
}
"""Public name -> the module that defines it."""

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "prune_env/ChannelPruning-v0": {"entry_point": "prune_env.config:make_env"},
    "prune_env/RuntimePruning-v0": {
        "entry_point": "prune_env.runtime_config:make_runtime_env",
        "vector_entry_point": "prune_env.runtime_config:make_runtime_vec",
    },
}
"""Environment id -> entry points."""

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'prune_env' has no attribute {name!r}")
    value = getattr(import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


def register_environments() -> None:
    """Register every environment id that is not yet known; safe to call again."""
    for name, entry_points in ENVIRONMENTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, **entry_points)


register_environments()
