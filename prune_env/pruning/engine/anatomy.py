"""What a deployed network is made of: the cut network, what decides its active channels, and what they cost."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from prune_env.pruning.engine.costs import Costs
from prune_env.pruning.engine.policy import PolicyMemory, RuntimePolicy
from prune_env.pruning.gating.layer import GatedLayer
from prune_env.pruning.gating.tradeoff import StaticDecision, count_of, select

HOOKED = threading.RLock()
"""Held while a forward pass hangs its decisions on the modules: another thread's pass would find them there."""


class Choice(nn.Module):
    """What decides the active channels of one gated layer, beside its runtime scores.

    Args:
        full: Channels before the static cut: what shares are shares of.
        keep: Share that may be active for an input, where no policy decides.
        score: `[channel]` static score of each stored channel.
        doubted: `[channel]` outside the static top.
        trust: Trust R in the runtime decision.
    """

    doubted: Tensor

    def __init__(
        self,
        *,
        full: int,
        keep: float,
        score: Float[Tensor, " channel"],
        doubted: Bool[Tensor, " channel"],
        trust: float,
    ) -> None:
        super().__init__()
        self.full, self.keep, self.trust = full, keep, trust
        self.score = nn.Parameter(score.detach().float().clone(), requires_grad=False)
        self.register_buffer("doubted", doubted.clone())

    def select(
        self, runtime: Float[Tensor, "sample channel"], keep: Float64[Tensor, " sample"]
    ) -> Bool[Tensor, "sample channel"]:
        """The active channels for these shares."""
        decision = StaticDecision(torch.zeros_like(self.doubted), self.doubted, self.trust)
        return select(runtime, self.score, count_of(keep, self.full), decision)


class Read(NamedTuple):
    """A layer that reads the channels of a gated one.

    Attributes:
        module: Its name.
        layer: The gated layer.
        index: Positions on the reader's input axis; None where they are the channels, one by one.
        unit: The channel of each position.
    """

    module: str
    layer: int
    index: tuple[int, ...] | None
    unit: tuple[int, ...] | None


class Anatomy(nn.Module):
    """The parts of a deployed network, whoever runs them.

    Attributes:
        network: The gated network underneath, cut.
        choices: One per gated layer, in forward order.
        policy: Decides the shares; None where each layer has its own.
        costs: What inputs cost.
        names: Module names of the gated layers.
        reads: Who reads their channels.
    """

    def __init__(
        self,
        network: nn.Module,
        choices: Sequence[Choice],
        policy: RuntimePolicy | None,
        costs: Costs,
        names: Sequence[str],
        reads: Sequence[Read],
    ) -> None:
        super().__init__()
        # torch's list does not say what it holds.
        listed = cast("Sequence[Choice]", nn.ModuleList(choices))
        self.network, self.choices, self.policy, self.costs = network, listed, policy, costs
        self.names = tuple(names)
        self.reads = tuple((module, layer, index, unit) for module, layer, index, unit in reads)

    @property
    def layers(self) -> list[GatedLayer]:
        """The gated layers in forward order."""
        # By name torch knows them as modules only.
        return cast("list[GatedLayer]", [self.network.get_submodule(name) for name in self.names])

    @property
    def constant(self) -> bool:
        """Whether every input gets the same choice."""
        return self.policy is None and all(choice.trust == 0 for choice in self.choices)


@dataclass(eq=False)
class Session:
    """The decisions about some inputs on their way through a deployed network.

    Attributes:
        anatomy: Its parts.
        samples: Inputs.
        active: `[sample, channel]` of each decided layer.
    """

    anatomy: Anatomy
    samples: int
    active: list[Bool[Tensor, "sample channel"]] = field(default_factory=list)
    _memory: PolicyMemory | None = None

    def turn(
        self, at: int, pooled: Float[Tensor, "sample input"], runtime: Float[Tensor, "sample channel"]
    ) -> tuple[Float[Tensor, " channel"], Bool[Tensor, "sample channel"]]:
        """Static scores and active channels of layer `at`, decided from what it reads and scores."""
        choice = self.anatomy.choices[at]
        self.active.append(choice.select(runtime, self._keep(at, choice, pooled, runtime)))
        return choice.score, self.active[-1]

    def _keep(self, at: int, choice: Choice, pooled: Tensor, runtime: Tensor) -> Float64[Tensor, " sample"]:
        policy, costs = self.anatomy.policy, self.anatomy.costs
        if policy is None:
            return torch.full((self.samples,), choice.keep, dtype=torch.float64, device=runtime.device)
        if self._memory is None:
            self._memory = policy.begin(self.samples)
        spent = costs.macs([active.sum(1) for active in self.active]) / costs.dense_macs
        return policy.ask(at, pooled, runtime, spent.expand(self.samples), self._memory)

    @property
    def counts(self) -> Int64[Tensor, "sample layer"]:
        """Active channels of each layer."""
        return torch.stack([active.sum(1) for active in self.active], dim=1)
