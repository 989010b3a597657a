"""What goes from step to step of a program beside the maps: who is active, and what the policy remembers."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from prune_env.pruning.engine import native
from prune_env.pruning.engine.anatomy import Anatomy
from prune_env.pruning.engine.policy import RuntimePolicy


class Reader:
    """Which inputs of a layer are channels of gated layers.

    Attributes:
        parts: The gated layers, each with positions and the channel of each; None for one by one.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, tuple[np.ndarray, np.ndarray] | None]] = []

    def add(self, layer: int, index: tuple[int, ...] | None, unit: tuple[int, ...] | None) -> None:
        """Positions `index` belong to channels `unit` of a gated layer; None for one by one."""
        self.parts.append((layer, None if index is None else (np.array(index), np.array(unit))))

    def alone(self, flow: Flow) -> int | None:
        """The gated layer whose channels, one by one and none but the active, are all of the input."""
        layer, places = self.parts[0]
        return layer if len(self.parts) == 1 and places is None and not flow.whole[layer] else None

    def only(self, layer: int, width: int) -> bool:
        """Whether the whole input is the channels of this gated layer, in their order."""
        (first, places), *others = self.parts
        if others or first != layer:
            return False
        return places is None or np.array_equal(positions_of(*places).ravel(), np.arange(width))


class Flow:
    """What goes from step to step beside the maps: who is active, and what the policy remembers.

    Args:
        deployed: The network that runs.

    Raises:
        RuntimeError: There is no kernel here.
    """

    def __init__(self, deployed: Anatomy) -> None:
        kernel = native.kernel()
        if kernel is None:
            raise RuntimeError("there is no compiled kernel here")
        # Not the network itself: its program lives as long as it does, and must not keep it alive.
        self.choices, self.costs, self.kernel = list(deployed.choices), deployed.costs, kernel
        widths = [layer.channels for layer in deployed.layers]
        self.active = [torch.zeros(width, dtype=torch.int32) for width in widths]
        self.columns = [torch.zeros(width, dtype=torch.int32) for width in widths]
        # Channels of the highest expected score first: what is seldom active lies together, and is seldom read.
        self.order = [layer.gate.bias.detach().argsort(descending=True) for layer in deployed.layers]
        self.kept = [0] * len(widths)
        self.whole = [False] * len(widths)
        self.threads = 1
        self._space, self._room = torch.zeros(0), 0
        self._tensors: list[Tensor] = []
        self.learned = deployed.policy
        self.policy = None if self.learned is None else self._policy(self.learned)
        self.memory = None if self.learned is None else self._memory(self.learned)

    def begin(self, threads: int) -> None:
        """A new input."""
        self.threads = threads
        if self.policy is not None and self.memory is not None:
            self.kernel.begin(byref(self.policy), byref(self.memory))

    def counts(self) -> Int64[Tensor, " layer"]:
        """Active channels of each gated layer."""
        return torch.tensor(self.kept)

    def space(self, room: int) -> int:
        """Address of a workspace with so many numbers for each thread."""
        if room * self.threads > self._room:
            self._room = room * self.threads
            self._space = torch.zeros(self._room)
        return self._space.data_ptr()

    def pin(self, values: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a copy that lives as long as the program."""
        values = values.detach().to(dtype).contiguous()
        self._tensors.append(native.paged(values) if values.nbytes >= native.HUGE_PAGE // 2 else values.clone())
        return self._tensors[-1].data_ptr()

    def _policy(self, policy: RuntimePolicy) -> native.Policy:
        costs = self.costs
        names = ("recurrent", "encoded", "spent", "previous", "head")
        return native.Policy(
            hidden=len(policy.head),
            **{name: self.pin(getattr(policy, name)) for name in names},
            head_bias=policy.head_bias,
            least=policy.least,
            dense_macs=costs.dense_macs,
            spent_first=float(costs.macs([])) / costs.dense_macs,
            terms=len(costs.weight),
            weight=self.pin(costs.weight, torch.float64),
            first=self.pin(costs.offset[0], torch.float64),
            second=self.pin(costs.offset[1], torch.float64),
        )

    def _memory(self, policy: RuntimePolicy) -> native.Memory:
        hidden, terms = torch.zeros(len(policy.head)), self.costs.offset[0]
        return native.Memory(
            hidden=self.pin(hidden),
            cell=self.pin(hidden),
            first=self.pin(terms, torch.float64),
            second=self.pin(terms, torch.float64),
        )

    def seat(self, at: int, order: Tensor | None) -> native.Seat | None:
        """The policy's place in front of a gated layer that reads its inputs in an order; None without a policy."""
        if self.learned is None:
            return None
        seat, costs = self.learned.seats[at], self.costs
        pooled = seat.pooled if order is None else seat.pooled[order]
        (pooled_mean, pooled_factor), (runtime_mean, runtime_factor) = seat.sees
        # The kernel adds what an input changes when it is active; what none of them being active means is added here.
        none = min(max(-pooled_mean * pooled_factor, -1.0), 1.0)
        return native.Seat(
            pooled=self.pin(pooled),
            **{name: self.pin(getattr(seat, name)) for name in ("runtime", "recurrent_bias")},
            encoder_bias=self.pin(seat.encoder_bias + none * seat.pooled.sum(0)),
            pooled_mean=pooled_mean,
            pooled_factor=pooled_factor,
            runtime_mean=runtime_mean,
            runtime_factor=runtime_factor,
            even=seat.even,
            constant_macs=float(costs.constant[at + 1]),
            first=self.pin(costs.slope[0, at], torch.float64),
            second=self.pin(costs.slope[1, at], torch.float64),
        )


def positions_of(index: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """`[channel, position]`; empty unless each channel has as many positions as the others, side by side."""
    each = max(1, len(unit) // (unit.max() + 1))
    alike = np.array_equal(unit, np.arange(len(unit)) // each)
    return (index.reshape(-1, each) if alike else index[:0]).astype(np.int32)
