"""What static decisions leave of a gated network: the part that is stored, and a way to train that part alone.

A channel that is removed for good is computed for nothing while the network is trained under masks: at half the
channels, three quarters of the work. The stored part is a smaller gated network; under the same decisions it computes
what the whole one computes, with the same gradients, and what it learns is put back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from prune_env.pruning.gating.layer import Decide, Question
from prune_env.pruning.gating.network import GatedNetwork, producer_of
from prune_env.pruning.gating.static import StaticVector
from prune_env.pruning.gating.tradeoff import StaticDecision, decide_static
from prune_env.pruning.plan import Plan


def static_decisions(gated: GatedNetwork, keeps: Sequence[float], trust: float) -> list[StaticDecision]:
    """What static shares decide about each gated layer."""
    return [
        decide_static(score.detach(), keep, trust) for score, keep in zip(gated.static.scores(), keeps, strict=True)
    ]


def stored_inputs(gated: GatedNetwork, decisions: Sequence[StaticDecision]) -> list[Int64[Tensor, " input"]]:
    """The inputs of each gated layer that some input of the network may use."""
    graph, modules = gated.graph, [producer_of(gated.graph, name).module for name in gated.names]
    stored = {
        module: np.ones(layer.gate.in_features, dtype=bool) for module, layer in zip(modules, gated.layers, strict=True)
    }
    for name, decision in zip(gated.names, decisions, strict=True):
        for slot in graph.group(name).consumers:
            if slot.module in stored:
                stored[slot.module][slot.positions(decision.removed.cpu().numpy())] = False
    return [torch.from_numpy(stored[module].nonzero()[0]) for module in modules]


def plan_of(gated: GatedNetwork, decisions: Sequence[StaticDecision]) -> Plan:
    """The channels that static decisions leave, as a plan."""
    return Plan({
        name: tuple(decision.kept.tolist()) for name, decision in zip(gated.names, decisions, strict=True)
    })  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredPart:
    """The part of a gated network that static decisions leave.

    Attributes:
        whole: The gated network; it is left as it is until `put_back`.
        decisions: Static decision about each gated layer.
        small: The stored part: a gated network of its own.
    """

    whole: GatedNetwork
    decisions: tuple[StaticDecision, ...]
    small: GatedNetwork

    @classmethod
    def of(cls, whole: GatedNetwork, decisions: Sequence[StaticDecision]) -> StoredPart:
        """Cut the stored part out.

        Raises:
            ValueError: Static scores follow from the weights: the removed channels could come to rank above others.
        """
        if not whole.static.free:
            raise ValueError("the stored part can be trained alone only where static scores are free numbers")
        return cls(whole, tuple(decisions), whole.cut(plan_of(whole, decisions)))

    def answering(self, decide: Decide) -> Decide:
        """Decisions that are made for the whole network, for the stored part.

        A removed channel stays removed however scores move: to the decisions it looks no better than the worst stored
        one.

        Args:
            decide: Answers questions of the whole network; what it removes for good has to be what `decisions` remove.
        """
        inputs = stored_inputs(self.whole, self.decisions)
        before = [score.detach().clone() for score in self.whole.static.scores()]

        def answer(question: Question) -> Bool[Tensor, "sample channel"]:
            at, device, samples = question.index, question.runtime.device, len(question.runtime)
            kept = self.decisions[at].kept.to(device)
            pooled = question.pooled.new_zeros(samples, self.whole.layers[at].gate.in_features)
            runtime = question.runtime.new_zeros(samples, len(before[at]))
            pooled[:, inputs[at].to(device)], runtime[:, kept] = question.pooled, question.runtime
            below = torch.nextafter(question.static.min(), question.static.new_tensor(-torch.inf))
            static = torch.minimum(before[at].to(question.static), below).index_copy(0, kept, question.static)
            return decide(dataclasses.replace(question, pooled=pooled, runtime=runtime, static=static))[:, kept]

        return answer

    @torch.no_grad()
    def put_back(self) -> None:
        """Write what the stored part has learned into the whole network, which computes the same then.

        Removed channels, and what stored ones read of them, stay as they were, but for their static scores: they have
        learned nothing, and rank below what has.
        """
        values, origins = self.small.state_dict(), _origins(self.whole, self.decisions)
        for name, tensor in self.whole.state_dict().items():
            if name in origins:
                learned, where = values[name].flatten().to(tensor), origins[name].to(tensor.device)
                tensor.copy_(tensor.flatten().index_copy(0, where, learned).view(tensor.shape))
        for layer, small, decision in zip(self.whole.layers, self.small.layers, self.decisions, strict=True):
            # What lost inputs, always zero, say to the predictor was part of the small layer's bias.
            if small.gate.in_features < layer.gate.in_features:
                (weight, _), (_, bias) = layer.predictor(), small.predictor()
                said = bias.to(weight) + (weight @ layer.sight.running_mean)[decision.kept]
                layer.gate.bias.index_copy_(0, decision.kept.to(weight.device), said)
        static = self.whole.static
        assert isinstance(static, StaticVector)  # or `of` would have refused it
        static.lower([decision.removed for decision in self.decisions])


@torch.no_grad()
def _origins(whole: GatedNetwork, decisions: Sequence[StaticDecision]) -> Mapping[str, Int64[Tensor, " value"]]:
    """Where each value of the stored part stands among the flattened ones of the whole network's tensor.

    Found by cutting a twin whose values are their own places, so that nothing has to be known about the layers.
    """
    twin = copy.deepcopy(whole).cpu().double()
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape))
    small = twin.cut(plan_of(whole, decisions))
    # Of the gates' biases a cut makes others, see `GatedLayer.absorb_zeros`.
    for layer, decision in zip(small.layers, decisions, strict=True):
        layer.gate.bias.copy_(decision.kept)
    return {name: value.flatten().long() for name, value in small.state_dict().items() if value.is_floating_point()}
