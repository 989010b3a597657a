"""Potentials: what a paper thinks of the plan so far, as one number per state, for `baselines.shaping`.

A plan of the environment keeps the highest-scored channels of each group, so what is thought of a group depends on its
count alone. A paper says it as curves, one number for every count of every group; here they become

    Phi(s) = sum over decided groups of (curve(kept) - curve(all)) / sum over groups to decide of (max - min of curve)

which is 0 where nothing is decided yet and within [-1, 1]: one weight means as much for every paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from prune_env.envs.dynamics import Problem, State
from prune_env.pruning.graph import Group

Vector = Float64[np.ndarray, " channel"]
Curve = Float64[np.ndarray, " _"]
"""What a group is worth with 0, 1, ..., all of its channels; larger is better, in any unit."""
Evidence = Callable[[Problem], Mapping[str, Curve]]
"""A paper's curves by group name; of a group that is not named the paper knows nothing."""


@dataclass(frozen=True, eq=False)
class Potential:
    """Phi of a state, by looking up one number per decided group.

    Attributes:
        tables: Per step, its share of Phi by the number of channels kept; NaN for counts that are not allowed.
    """

    tables: tuple[Curve, ...]

    @classmethod
    def of(cls, problem: Problem, curves: Mapping[str, Curve]) -> Potential:
        """The potential of a problem.

        Args:
            problem: What is decided; its allowed counts are the ones that are looked at.
            curves: From a paper.

        Raises:
            ValueError: A curve that is not finite, or curves that tell no plan from another.
        """
        tables, spread = [], 0.0
        for step, counts in zip(problem.steps, problem.allowed, strict=True):
            group = problem.graph.groups[step]
            curve = curves.get(group.name, np.zeros(group.channels + 1))
            table = np.full(group.channels + 1, np.nan)
            table[counts] = curve[counts] - curve[-1]
            if not np.isfinite(table[counts]).all():
                raise ValueError(f"the potential of group {group.name!r} is not finite: {curve[counts].tolist()}")
            tables.append(table)
            spread += float(np.ptp(table[counts]))
        if spread == 0:
            raise ValueError("the potential is the same for every plan of this network")
        return cls(tuple(table / spread for table in tables))

    def __call__(self, state: State) -> float:
        """Phi of a state that is not terminal."""
        return float(sum(table[count] for table, count in zip(self.tables, state.kept, strict=False)))


def ranked(problem: Problem, group: Group) -> Int64[np.ndarray, " channel"]:
    """The channels of a group, those first that stay longest: the order in which plans keep them."""
    return np.argsort(-np.asarray(problem.scores[group.name], dtype=np.float64), kind="stable")


def kept(worth: Vector) -> Curve:
    """Share of what the channels are worth together that the first 0, 1, ..., all of them carry; 0 if it is nothing.

    Args:
        worth: Of each channel, from 0, those first that stay longest.
    """
    total = worth.sum()
    return np.concatenate([[0.0], np.cumsum(worth)]) / (total if total > 0 else 1.0)


def importance(problem: Problem) -> dict[str, Curve]:
    """Plain importance: the share of each group's importance that is kept; a group's least counts as nothing below 0.

    No paper's: the scores by which the environment ranks channels anyway.
    """
    curves = {}
    for group in problem.graph.groups:
        scores = np.asarray(problem.scores[group.name], dtype=np.float64)[ranked(problem, group)]
        curves[group.name] = kept(scores - min(scores.min(), 0.0))
    return curves
