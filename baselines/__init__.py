"""Published methods and heuristics, each its choice at four stages, and `prune`, which applies one to a task."""

from __future__ import annotations

import math
from typing import Any

from baselines import (
    channel_gating,
    directional_pruning,
    heuristics,
    merging_redundancy,
    neuron_merging,
    polarization,
    provable_filter_pruning,
    scop,
)
from baselines.method import Case, Method, Result, run
from baselines.policy import CountsPolicy, MethodPolicy
from baselines.search import search_method
from prune_env.checks import check_name
from prune_env.config import make_problem
from prune_env.envs.dynamics import Problem
from prune_env.tasks.task import Task
from prune_env.tasks.training.loop import Progress

__all__ = ["METHODS", "Case", "CountsPolicy", "Method", "MethodPolicy", "Result", "method_of", "policy", "prune"]

METHODS: dict[str, Method] = {
    "uniform": heuristics.UNIFORM,
    "random": heuristics.RANDOM,
    "global_magnitude": heuristics.GLOBAL_MAGNITUDE,
    "lamp": heuristics.LAMP,
    "first_last": heuristics.FIRST_LAST,
    "greedy": heuristics.GREEDY,
    "error_curves": heuristics.ERROR_CURVES,
    "provable_filter_pruning": provable_filter_pruning.DETERMINISTIC,
    "provable_filter_pruning_random": provable_filter_pruning.RANDOM,
    "provable_filter_pruning_mixed": provable_filter_pruning.MIXED,
    "neuron_merging": neuron_merging.NEURON_MERGING,
    "merge_cost": merging_redundancy.MERGE_COST,
    "merging_clusters": merging_redundancy.MERGING_CLUSTERS,
    "polarization": polarization.POLARIZATION,
    "slimming": polarization.SLIMMING,
    "scop": scop.SCOP,
    "scop_negative": scop.SCOP_NEGATIVE,
    "scop_fdr": scop.SCOP_FDR,
    "directional_pruning": directional_pruning.DIRECTIONAL,
    "channel_gating_surrogate": channel_gating.SURROGATE,
    "random_search": search_method("random_search"),
    "cem": search_method("cem"),
    "evolution": search_method("evolution"),
    "annealing": search_method("annealing"),
    "netadapt": search_method("netadapt"),
    "bayesian": search_method("bayesian"),
}


def method_of(name: str | Method) -> Method:
    """The method of that name; a `Method` of your own is handed back.

    Raises:
        ValueError: There is none; names the closest.
    """
    if isinstance(name, Method):
        return name
    check_name("method", name, METHODS)
    return METHODS[name]


def prune(
    method: str | Method,
    task: Task,
    *,
    budget: float | int | None = None,
    budget_resource: str = "macs",
    keep: float | int | None = None,
    importance: str = "l1",
    recalibrate: bool = True,
    refit: str | bool = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Prune a task's network by one method; repaired and measured exactly as the env does it.

    Args:
        method: A name in `METHODS`, or a `Method` of your own.
        task: From `prune_env.make_task`, or built by hand from your own network and data. It is left as it is.
        budget: Share of the dense network's resource in (0, 1], or an absolute number above 1.
        budget_resource: What the budget bounds: `macs` or `params`.
        keep: In place of a budget: the same share of the channels in every group, in (0, 1]. The method's allocation
            is not asked then; its other stages are.
        importance: Static importance that ranks the channels of a group, unless the method brings its own.
        recalibrate: Re-estimate BatchNorm statistics on training images after the cut.
        refit: Refit of the layers behind a cut: `auto`, `none`, `moments` or `sequential`; True is `moments`, False
            `none`.
        seed: Seed of all that the method draws.
        progress: Told about every step of a method that trains before it prunes.
        **options: Further fields of `prune_env.config.EnvConfig`: `leave`, `round_to`, `min_channels`,
            `min_keep`, `calibration_images`, `device`.

    Returns:
        The pruned network, its plan, and what it measures on the search split and (once, on first access) on the test
        split.

    Raises:
        ValueError: An unknown name, a budget below the reachable minimum, both or none of budget and keep, or any
            other value that is not allowed.
    """
    chosen = method_of(method)
    _check_aim(budget, keep)
    refit = {True: "moments", False: "none"}[refit] if isinstance(refit, bool) else refit
    prepared = chosen.prepare(task, seed, progress)
    problem = make_problem(
        prepared,
        budget=1.0 if budget is None else budget,
        budget_resource=budget_resource,
        importance=importance,
        recalibrate=recalibrate,
        refit=refit,
        **options,
    )
    return run(chosen, problem, task=prepared, keep=keep, seed=seed)


def policy(method: str | Method, problem: Problem, *, budget: float | int | None = None, seed: int = 0) -> MethodPolicy:
    """A method's allocation as a policy for `prune_env/ChannelPruning-v0` and SB3's `evaluate_policy`.

    Args:
        method: A name in `METHODS`, or a `Method` of your own.
        problem: The decision problem that is played: `env.unwrapped.problem`. Of a method that trains first, that of
            the task it prepared: `make_problem(method.prepare(task, seed, None))`.
        budget: A share or an absolute number; None reads each episode's budget from the observation.
        seed: Seed of all that the method draws.

    Raises:
        ValueError: An unknown name, or a budget below the reachable minimum.
    """
    return MethodPolicy(method_of(method), problem, budget=budget, seed=seed)


def _check_aim(budget: float | int | None, keep: float | int | None) -> None:
    """Refuse anything but one of budget and keep; the problem checks the budget itself."""
    if (budget is None) == (keep is None):
        raise ValueError(f"exactly one of budget and keep is needed; got budget={budget!r} and keep={keep!r}")
    if keep is None:
        return
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not number or not math.isfinite(keep) or not 0 < keep <= 1:
        raise ValueError(f"keep is {keep!r}; a share of the channels in (0, 1] is allowed")
