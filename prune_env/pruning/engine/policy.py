"""A learned runtime policy for deployment: plain tensors, at one budget, with all that no input changes folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional


@dataclass(eq=False)
class PolicyMemory:
    """What a policy knows of the layers before.

    Attributes:
        hidden: `[sample, hidden]` state of its recurrent layer.
        cell: `[sample, hidden]` the other half of it.
        previous: `[sample]` share asked for in the layer before, one at first.
    """

    hidden: Float[Tensor, "sample hidden"]
    cell: Float[Tensor, "sample hidden"]
    previous: Float64[Tensor, " sample"]


@dataclass(frozen=True)
class Sight:
    """How numbers of a layer are brought to [-1, 1]: `clip((value - mean) * factor)`.

    Attributes:
        mean: Mean.
        factor: One over the range.
    """

    mean: float
    factor: float

    def __call__(self, values: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The values as the policy sees them."""
        return ((values - self.mean) * self.factor).clamp(-1.0, 1.0)


class PolicySeat(nn.Module):
    """A policy's place in front of one gated layer.

    Args:
        pooled: `[input, hidden]` encoder of what the layer reads.
        runtime: `[output, hidden]` encoder of the runtime scores.
        encoder_bias: `[hidden]`.
        recurrent_bias: `[4 hidden]` of the recurrent layer, with its fields that are the same for every input.
        sees: Sight of the pooled inputs and of the runtime scores.
        even: The share that the policy moves away from.
    """

    def __init__(
        self,
        pooled: Float[Tensor, "input hidden"],
        runtime: Float[Tensor, "output hidden"],
        encoder_bias: Float[Tensor, " hidden"],
        recurrent_bias: Float[Tensor, " gates"],
        sees: tuple[Sight, Sight],
        even: float,
    ) -> None:
        super().__init__()
        self.pooled, self.runtime = _frozen(pooled), _frozen(runtime)
        self.encoder_bias, self.recurrent_bias = _frozen(encoder_bias), _frozen(recurrent_bias)
        self.sees = tuple((sight.mean, sight.factor) for sight in sees)
        self.even = even

    def encode(
        self, pooled: Float[Tensor, "sample input"], runtime: Float[Tensor, "sample output"]
    ) -> Float[Tensor, "sample hidden"]:
        """What the layer reads and scores, encoded."""
        seen = [Sight(*sight)(value) for sight, value in zip(self.sees, (pooled, runtime), strict=True)]
        return (self.encoder_bias + seen[0] @ self.pooled + seen[1] @ self.runtime).relu()


class RuntimePolicy(nn.Module):
    """A recurrent policy's mean decisions: an encoder per layer, an LSTM over layers, one share.

    Args:
        seats: One per gated layer.
        encoded: `[hidden, 4 hidden]` LSTM weights of the encoded input; gates in torch's order.
        recurrent: `[hidden, 4 hidden]` LSTM weights of the hidden state.
        spent: `[4 hidden]` LSTM weights of the macs so far.
        previous: `[4 hidden]` LSTM weights of the previous share.
        head: `[hidden]` weights of the answer.
        head_bias: Its bias.
        least: Least share that can be asked for.
    """

    def __init__(
        self,
        seats: Sequence[PolicySeat],
        *,
        encoded: Float[Tensor, "hidden gates"],
        recurrent: Float[Tensor, "hidden gates"],
        spent: Float[Tensor, " gates"],
        previous: Float[Tensor, " gates"],
        head: Float[Tensor, " hidden"],
        head_bias: float,
        least: float,
    ) -> None:
        super().__init__()
        # torch's list does not say what it holds.
        self.seats = cast("Sequence[PolicySeat]", nn.ModuleList(seats))
        self.encoded, self.recurrent = _frozen(encoded), _frozen(recurrent)
        self.spent, self.previous, self.head = _frozen(spent), _frozen(previous), _frozen(head)
        self.head_bias, self.least = head_bias, least

    def begin(self, samples: int) -> PolicyMemory:
        """The memory in front of the first layer."""
        nothing = self.head.new_zeros(samples, len(self.head))
        return PolicyMemory(nothing, nothing, torch.ones(samples, dtype=torch.float64, device=self.head.device))

    def ask(
        self,
        at: int,
        pooled: Float[Tensor, "sample input"],
        runtime: Float[Tensor, "sample output"],
        spent: Float64[Tensor, " sample"],
        memory: PolicyMemory,
    ) -> Float64[Tensor, " sample"]:
        """The share of layer `at` that may be active for each input; the memory goes on.

        Args:
            at: The layer.
            pooled: What it reads, averaged over positions.
            runtime: Its runtime scores.
            spent: Macs so far as a share of the dense network's.
            memory: Of these inputs.
        """
        seat = self.seats[at]
        with torch.autocast(self.head.device.type, enabled=False):
            gates = seat.recurrent_bias + seat.encode(pooled, runtime) @ self.encoded + memory.hidden @ self.recurrent
            gates = gates + (spent.clamp(0.0, 2.0) / 2.0).float()[:, None] * self.spent
            gates = gates + memory.previous.float()[:, None] * self.previous
            into, keep, fresh, out = gates.chunk(4, dim=1)
            memory.cell = keep.sigmoid() * memory.cell + into.sigmoid() * fresh.tanh()
            memory.hidden = out.sigmoid() * memory.cell.tanh()
            action = (functional.linear(memory.hidden, self.head[None])[:, 0] + self.head_bias).clamp(-1.0, 1.0)
        memory.previous = (seat.even + action.double()).clamp(self.least, 1.0)
        return memory.previous


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float().clone(), requires_grad=False)
