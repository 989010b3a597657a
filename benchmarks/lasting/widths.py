"""What a plan's counts say by themselves: widths, bottlenecks and where the macs are. Costs nothing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from prune_env.envs.dynamics import Problem

THIRDS = ("early", "middle", "late")


def widths(problem: Problem, counts: Int[np.ndarray, " step"]) -> dict[str, float]:
    """Statistics of the channels kept in each step, of which higher may or may not be better.

    Args:
        problem: Whose steps these are.
        counts: Channels kept in each.

    Returns:
        `mean_keep`, `min_keep` (shares), `min_channels`, `log_widths` (sum of logarithms: the log of the product of
        widths), `log_params`, `tilt` (mean share of the last third of steps above that of the first), and
        `macs_early`, `macs_middle`, `macs_late`: what the thirds cost, as shares of the dense network's macs.
    """
    full = problem.graph.full.copy()
    full[list(problem.steps)] = counts
    shares = np.asarray(counts) / np.asarray(problem.channels)
    # Each third has at least one step, where there are that many.
    thirds = np.array_split(np.arange(len(counts)), 3)
    spent = {f"macs_{name}": _spent(problem, full, third) for name, third in zip(THIRDS, thirds, strict=True)}
    ends = [float(shares[third].mean()) if len(third) else float(shares.mean()) for third in thirds]
    return {
        "mean_keep": float(shares.mean()),
        "min_keep": float(shares.min()),
        "min_channels": float(np.min(counts)),
        "log_widths": float(np.log(counts).sum()),
        "log_params": float(np.log(problem.graph.cost["params"](full))),
        "tilt": ends[-1] - ends[0],
        **spent,
    }


def _spent(problem: Problem, full: Int[np.ndarray, " group"], third: Int[np.ndarray, " step"]) -> float:
    """What some steps add to the network's macs, as a share of the dense network's."""
    without = full.copy()
    without[[problem.steps[step] for step in third]] = 0
    cost = problem.graph.cost["macs"]
    return float(cost(full) - cost(without)) / float(cost(problem.graph.full))


def error_sums(curves: list[Float[np.ndarray, " level"]], at: list[int]) -> dict[str, float]:
    """Errors of the groups at a plan's levels, negative so that higher is better.

    Args:
        curves: Per step its error curve, as a share of the output's second moment.
        at: Per step the plan's level on that curve.
    """
    errors = np.array([curve[level] for curve, level in zip(curves, at, strict=True)])
    return {"neg_sum": -float(errors.sum()), "neg_max": -float(errors.max())}
