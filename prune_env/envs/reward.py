"""Rewards: pure functions of what the dense and the pruned network measure, as named terms.

The env adds the terms up and carries each in `info` as `reward/<term>`. A new reward is one function and one line in
`REWARDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prune_env.checks import check_name
from prune_env.pruning.measure import Budget, Measurement

Reward = Callable[[Measurement, Measurement, Budget], Mapping[str, float]]

STEEPNESS = 1.2
SLACK = 0.03
"""Constants of the exponential penalty, from the official code of the core paper."""


def accuracy(dense: Measurement, pruned: Measurement, budget: Budget) -> dict[str, float]:
    """Accuracy on the search split; the budget is kept by the dynamics.

    AMC's `R_err = -Error` (He et al. 2018, arXiv 1802.03494, section 3.3), moved by one.
    """
    return {"accuracy": pruned.accuracy}


def accuracy_guaranteed(dense: Measurement, pruned: Measurement, budget: Budget) -> dict[str, float]:
    """`-Error * log(macs)`, or of params when these are budgeted: small networks, but never at the price of accuracy.

    AMC's `R_FLOPs` and `R_Param` (He et al. 2018, arXiv 1802.03494, section 3.3). The paper uses it without a bound
    on the resource: that is `budget=1`.
    """
    return {"error_log_size": -(1.0 - pruned.accuracy) * math.log(_used(pruned, budget))}


def exponential_penalty(dense: Measurement, pruned: Measurement, budget: Budget) -> dict[str, float]:
    """`R_acc + R_bud`, where going over the budget costs exponentially much and staying below it earns nothing.

    Runtime/static pruning by RL (the core paper), eq. 7-10 with the sign and constants of its official code for the
    static agent: `R_bud = -1.2 * (exp((B - Bbar) / 0.03) - 1)` for a used share B above the budget's share Bbar, else
    0. Deviations: B is what is really kept, not what the agent asked for; and `R_acc` is `-Error`, because the paper's
    (minus an image's loss over the running mean of losses) needs a memory, which a pure function has not. With
    `hard_budget=True` the penalty never comes due.
    """
    over = (_used(pruned, budget) - budget.limit) / _used(dense, budget)
    penalty = -STEEPNESS * math.expm1(over / SLACK) if over > 0 else 0.0
    return {"accuracy": pruned.accuracy - 1.0, "budget": penalty}


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "accuracy_guaranteed": accuracy_guaranteed,
    "exponential_penalty": exponential_penalty,
}


def reward_of(name: str) -> Reward:
    """The reward of that name.

    Raises:
        ValueError: There is none; names the closest.
    """
    check_name("reward", name, REWARDS)
    return REWARDS[name]


def _used(measured: Measurement, budget: Budget) -> float:
    """How much of the budget's resource a network uses."""
    return float({"macs": measured.macs, "params": measured.params}[budget.resource])
