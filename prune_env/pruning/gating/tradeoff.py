"""The trade-off between runtime and static decisions: which channels are removed for good, which are active per input.

Chen, Chen, Pan, "Storage Efficient and Dynamic Flexible Runtime Channel Pruning via Deep Reinforcement Learning"
(NeurIPS 2020), equations 3 to 5. With d_r and d_s the shares that the two agents keep of a layer's C channels, and R
the trust in the runtime decision (their R_r):

    M_r = channels outside the top d_r C by runtime score       M_s = the same by static score and d_s
    M_o = M_r and M_s                                           always pruned
    M   = M_o  +  the floor(R |M_r - M_o|) lowest by runtime score of M_r - M_o
               +  the floor((1 - R) |M_s - M_o|) lowest by static score of M_s - M_o

R = 1 is runtime pruning alone, R = 0 static pruning alone. The paper says that the floor((1 - R)(1 - d_s) C) channels
of lowest static score can then never be selected. That does not follow from the equations: a channel at the very
bottom of M_s may be in the runtime top and escape. It is imposed here: those channels are removed first (they stand
outside the runtime top whatever their score), and the equations choose among the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StaticDecision:
    """What is decided about a layer for all inputs at once.

    Attributes:
        removed: `[channel]` never active, so they can be cut for good.
        doubted: `[channel]` outside the static top but not removed: the runtime decision may keep them.
        trust: Trust R in the runtime decision, in [0, 1].
    """

    removed: Bool[Tensor, " channel"]
    doubted: Bool[Tensor, " channel"]
    trust: float

    @property
    def kept(self) -> Int64[Tensor, " kept"]:
        """Indices of the channels that are stored."""
        return (~self.removed).nonzero().flatten()


def check_trust(trust: Any) -> float:
    """The trust as a float.

    Raises:
        ValueError: It is not a number in [0, 1].
    """
    number = isinstance(trust, int | float) and not isinstance(trust, bool)
    if not number or not 0 <= trust <= 1:
        raise ValueError(f"runtime_trust is {trust!r}; a share in [0, 1] is allowed (1 trusts the runtime alone)")
    return float(trust)


def count_of(keep: Float[Tensor, "*batch"], channels: int) -> Int64[Tensor, "*batch"]:
    """Shares as counts: the nearest number of channels, at least one, at most all."""
    return (keep.double() * channels).round().long().clamp(1, channels)


def decide_static(static: Float[Tensor, " channel"], keep: float | int, trust: float | int) -> StaticDecision:
    """Which channels go for good, and which are left to the runtime decision although the static one doubts them.

    Args:
        static: Static score of each channel, higher = keep; ties go to the lower index.
        keep: Share d_s in (0, 1] that the static decision keeps.
        trust: R in [0, 1].

    Raises:
        ValueError: A share that is not allowed.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"static keep is {keep!r}; a share in (0, 1] is allowed")
    trust, channels = check_trust(trust), len(static)
    outside = channels - int(count_of(torch.tensor(keep, dtype=torch.float64), channels))
    # A hair above, so that (1 - .7) * 10 is 3 whole channels in floating point, too.
    gone = math.floor((1 - trust) * outside + 1e-9)
    place = rank(static)
    return StaticDecision(place >= channels - gone, (place >= channels - outside) & (place < channels - gone), trust)


def select(
    runtime: Float[Tensor, "sample channel"],
    static: Float[Tensor, " channel"],
    counts: Int64[Tensor, " sample"],
    decision: StaticDecision,
) -> Bool[Tensor, "sample channel"]:
    """The channels that are active for each input.

    On a layer whose removed channels were cut away (with scores, `doubted` and `removed` restricted to the rest) it
    selects the same channels: what is removed takes no part in any count.

    Args:
        runtime: Runtime score of each channel for each input, higher = keep; ties go to the lower index.
        static: Static score of each channel.
        counts: Channels that the runtime decision keeps for each input, at least 1 (d_r C).
        decision: The static decision.

    Returns:
        True where a channel is active; never True for a removed one, and at least once per input.
    """
    trust, doubted = decision.trust, decision.doubted
    order = _order(runtime.masked_fill(decision.removed, -torch.inf))
    out = (_places(order) >= counts.unsqueeze(1)) & ~decision.removed
    only_runtime, only_static = out & ~doubted, ~out & doubted
    # Never both shares are whole, and each top holds a channel: at least one stays active.
    runtime_share = (trust * only_runtime.sum(1, keepdim=True).double() + 1e-9).floor()
    static_share = ((1 - trust) * only_static.sum(1, keepdim=True).double() + 1e-9).floor()
    # Lowest scores first: those with fewer candidates behind them than there are to prune.
    pruned = out & doubted | only_runtime & (_behind(order, only_runtime) < runtime_share)
    pruned |= only_static & (_behind(_order(static).expand_as(order), only_static) < static_share)
    return ~pruned & ~decision.removed


def rank(scores: Float[Tensor, "*batch channel"]) -> Int64[Tensor, "*batch channel"]:
    """Place of each channel, 0 for the highest score; ties go to the lower index."""
    return _places(_order(scores))


def _order(scores: Float[Tensor, "*batch channel"]) -> Int64[Tensor, "*batch channel"]:
    """Channels from the highest score to the lowest; ties go to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def _places(order: Int64[Tensor, "*batch channel"]) -> Int64[Tensor, "*batch channel"]:
    """Place of each channel in an order."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _behind(
    order: Int64[Tensor, "sample channel"], candidates: Bool[Tensor, "sample channel"]
) -> Int64[Tensor, "sample channel"]:
    """Candidates that stand behind each channel in an order."""
    so_far = candidates.gather(-1, order).cumsum(-1)
    return torch.empty_like(order).scatter_(-1, order, so_far[:, -1:] - so_far)
