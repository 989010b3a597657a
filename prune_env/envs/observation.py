"""What the agent sees: named fields in [0, 1], the same for every network.

Importance is shown as quantiles, so that a layer of 16 channels and one of 512 look alike. What is known before the
episode is a table with one row per step; what changes comes from the `Outlook`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from gymnasium import spaces
from jaxtyping import Float

from prune_env.envs.dynamics import Outlook, Problem, State
from prune_env.pruning.graph import Group, LayerGraph

LAYER = (
    "convolution",  # 1 for a convolution, 0 for a linear layer
    "channels",  # log2 / 12, as are the input channels of the first layer that writes the group
    "inputs",
    "kernel",  # side / 7
    "stride",  # / 4
    "positions",  # log2 of the output positions / 16
    "writers",  # log2(1 + number) / 8: layers that write, carry and read the group
    "carriers",
    "readers",
    "macs",  # share of the dense macs and params that only this group's channels cause
    "params",
)
"""Entries of the field `layer`."""

CHANGING = {
    "position": 1,
    "budget": 1,
    "spent": 1,
    "forced": 1,
    "left": 1,
    "rest": 1,
    "price": 1,
    "feasible": 2,
    "previous_keep": 1,
}
"""Fields that follow from the state, and their lengths."""

KNOWN = {
    "layer": len(LAYER),
    "static_importance": 11,
    "static_level": 1,
    "runtime_importance": 11,
    "runtime_spread": 11,
    "error_curve": 9,
}
"""Fields that are known before the episode, and their lengths."""


def space() -> spaces.Space:
    """The observation space: one for all networks, tasks and budgets."""
    return spaces.Dict({name: spaces.Box(0.0, 1.0, (width,), np.float32) for name, width in (CHANGING | KNOWN).items()})


def describe(
    graph: LayerGraph,
    steps: Iterable[int],
    *,
    scores: Mapping[str, np.ndarray],
    activations: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The fields that are known before an episode.

    Args:
        graph: The network's graph.
        steps: Groups that are decided, as positions in `graph.groups`.
        scores: Group name -> static importance, `[channels]`.
        activations: Group name -> pooled activations, `[samples, channels]`, not negative.
        curves: Group name -> relative reconstruction error at rising keep.

    Returns:
        Field -> `[steps + 1, width]` float32; the last row, for the end of an episode, is zero.
    """
    level = max((float(np.mean(_above_zero(score))) for score in scores.values()), default=0.0) or 1.0
    rows: dict[str, list[np.ndarray]] = {name: [] for name in KNOWN}
    for step in steps:
        group = graph.groups[step]
        score = _above_zero(scores[group.name])
        pooled = np.asarray(activations[group.name], dtype=np.float64)
        mean, spread = pooled.mean(axis=0), pooled.std(axis=0)
        rows["layer"].append(_layer(graph, step, group))
        rows["static_importance"].append(quantiles(score / (score.max() or 1.0), KNOWN["static_importance"]))
        rows["static_level"].append(np.array([score.mean() / level]))
        rows["runtime_importance"].append(quantiles(mean / (mean.max() or 1.0), KNOWN["runtime_importance"]))
        rows["runtime_spread"].append(quantiles(spread / (mean.max() or 1.0), KNOWN["runtime_spread"]))
        rows["error_curve"].append(np.asarray(curves[group.name], dtype=np.float64))
    table = {name: np.stack([*row, np.zeros(KNOWN[name])]) for name, row in rows.items()}
    return {name: np.nan_to_num(np.clip(row, 0.0, 1.0)).astype(np.float32) for name, row in table.items()}


def observe(problem: Problem, state: State, ahead: Outlook) -> dict[str, np.ndarray]:
    """The observation of a state; every array is new.

    Args:
        problem: What is decided.
        state: Where the episode is.
        ahead: Its outlook.
    """
    at, total = state.position, problem.total
    whole = problem.channels[at] if at < len(problem.steps) else 1
    lowest, highest = (ahead.feasible[0] / whole, ahead.feasible[-1] / whole) if len(ahead.feasible) else (0.0, 0.0)
    changing = {
        "position": (at / len(problem.steps),),
        "budget": (state.budget.limit / total,),
        "spent": (ahead.spent / total,),
        "forced": (ahead.forced / total,),
        "left": (max(ahead.left, 0.0) / total,),
        "rest": (ahead.rest / total,),
        "price": (ahead.price / total,),
        "feasible": (lowest, highest),
        "previous_keep": (state.kept[-1] / problem.channels[at - 1] if at else 1.0,),
    }
    fresh = {name: np.array(value, dtype=np.float32) for name, value in changing.items()}
    return fresh | {name: rows[at].copy() for name, rows in problem.fields.items()}


def quantiles(values: Float[np.ndarray, " channel"], number: int) -> Float[np.ndarray, " quantile"]:
    """Evenly spaced quantiles from the least to the greatest value."""
    return np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0.0, 1.0, number))


def _above_zero(score: np.ndarray) -> np.ndarray:
    """Scores moved so that none is negative; their order and distances stay."""
    score = np.asarray(score, dtype=np.float64)
    return score - min(0.0, float(score.min()))


def _layer(graph: LayerGraph, step: int, group: Group) -> np.ndarray:
    """The field `layer` of a group, described by the first layer that writes it."""
    layer = graph.layer(group.producers[0].module)
    without = graph.full.copy()
    without[step] = 0
    caused = {name: 1.0 - float(cost(without)) / float(cost(graph.full)) for name, cost in graph.cost.items()}
    return np.array(
        [
            float(layer.kind == "conv"),
            np.log2(group.channels) / 12,
            np.log2(layer.in_channels) / 12,
            max(layer.kernel, default=1) / 7,
            max(layer.stride, default=1) / 4,
            np.log2(max(layer.positions, 1)) / 16,
            *(np.log2(1 + len(slots)) / 8 for slots in (group.producers, group.carriers, group.consumers)),
            caused["macs"],
            caused["params"],
        ]
    )
