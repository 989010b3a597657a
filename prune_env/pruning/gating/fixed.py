"""Fixed decisions: the same shares for every input, or even the same channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.tradeoff import check_trust, count_of, decide_static, select


class FixedDecisions:
    """Answers each layer's question with the same runtime and static share for every input.

    Which channels these are still depends on the input.

    Args:
        runtime_keeps: Share of each layer's channels that may be active for one input, in (0, 1].
        static_keeps: Share that the static decision keeps; None keeps all.
        trust: Trust R in the runtime decision, in [0, 1].

    Raises:
        ValueError: A share that is not allowed.
    """

    def __init__(
        self, runtime_keeps: Sequence[float], static_keeps: Sequence[float] | None = None, *, trust: float | int = 1.0
    ) -> None:
        statics = tuple(runtime_keeps) if static_keeps is None and trust < 1 else static_keeps
        self.runtime_keeps = tuple(float(keep) for keep in runtime_keeps)
        self.static_keeps = tuple(float(keep) for keep in statics) if statics else (1.0,) * len(self.runtime_keeps)
        self.trust = check_trust(trust)
        for keep in (*self.runtime_keeps, *self.static_keeps):
            if not 0 < keep <= 1:
                raise ValueError(f"keep is {keep}; a share in (0, 1] is allowed")

    def __call__(self, question: Question) -> Bool[Tensor, "sample channel"]:
        """The active channels."""
        samples, channels = question.runtime.shape
        keep = torch.tensor(self.runtime_keeps[question.index], dtype=torch.float64)
        count = count_of(keep, channels).to(question.runtime.device)
        decision = decide_static(question.static, self.static_keeps[question.index], self.trust)
        return select(question.runtime, question.static, count.expand(samples), decision)


class SameChannels:
    """Answers each layer's question with the same channels for every input.

    Args:
        channels: `[channel]` per layer: whether it is active.

    Raises:
        ValueError: A layer without an active channel.
    """

    def __init__(self, channels: Sequence[Bool[Tensor, " _"]]) -> None:
        self.channels = tuple(channels)
        for at, active in enumerate(self.channels):
            if not active.any():
                raise ValueError(f"no channel of layer {at} is active; at least one is needed")

    @classmethod
    def most_often(cls, often: Sequence[Int64[Tensor, " _"]], counts: Sequence[int]) -> SameChannels:
        """Those that other decisions made active for most inputs.

        Args:
            often: For how many inputs each channel of a layer was active.
            counts: How many to take in each layer; never one that was active for no input, and at least one.
        """
        chosen = []
        for active, count in zip(often, counts, strict=True):
            most = active.argsort(descending=True, stable=True)[: max(1, min(count, int((active > 0).sum())))]
            chosen.append(torch.zeros(len(active), dtype=torch.bool).index_fill(0, most, True))
        return cls(chosen)

    def __call__(self, question: Question) -> Bool[Tensor, "sample channel"]:
        """The active channels."""
        active = self.channels[question.index].to(question.runtime.device)
        return active.expand(len(question.runtime), -1)
