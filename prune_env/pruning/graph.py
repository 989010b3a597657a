"""The layer graph: which channels of a network live or die together, and what keeping them costs.

Everything here is names and integers: a `LayerGraph` holds no tensor, so it is small, pickles, and serves every
network of the same architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from prune_env.checks import did_you_mean

if TYPE_CHECKING:
    from prune_env.pruning.plan import Plan


@dataclass(frozen=True, eq=False)
class Slot:
    """One axis of one module (or bare parameter) that a group indexes.

    Attributes:
        module: Dotted name in `network.named_modules()`; for a bare `nn.Parameter`, the parameter's dotted name.
        role: `out` (output of a convolution or linear layer), `in` (its input), `both` (a norm, a depthwise or
            grouped convolution, a PReLU: input and output channels are the same), or `parameter`.
        index: Positions along that axis, int64, in rising order.
        unit: The channel of the group that each position belongs to, same length as `index`. A flatten between
            convolution and linear layer gives many positions per channel; a concatenation, an offset.
        dim: The axis of a bare parameter; other roles find theirs by the module's type.
    """

    module: str
    role: str
    index: np.ndarray
    unit: np.ndarray
    dim: int = 0

    @cached_property
    def aligned(self) -> bool:
        """Whether position i belongs to channel i: no flatten, concatenation or grouping on the way."""
        return np.array_equal(self.index, self.unit) and np.array_equal(self.unit, np.arange(len(self.unit)))

    def positions(self, kept: np.ndarray) -> np.ndarray:
        """Positions along the axis that belong to the kept channels (bool mask over the group's channels)."""
        return self.index[kept[self.unit]]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that live or die together.

    Attributes:
        name: The first producer in forward order; `#2`, `#3` tell groups apart that start at the same layer.
        channels: Number of channels. Where a grouped convolution or a GroupNorm binds several positions into one
            unit, one channel stands for that whole unit.
        producers: Layers that write the channels (role `out`).
        carriers: Norms, depthwise and grouped convolutions, PReLUs and bare parameters on the way.
        consumers: Layers that read the channels (role `in`).
    """

    name: str
    channels: int
    producers: tuple[Slot, ...]
    carriers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All axes that the group indexes."""
        return self.producers + self.carriers + self.consumers


@dataclass(frozen=True, eq=False)
class Layer:
    """One convolution or linear layer, as its cost sees it.

    Attributes:
        name: Dotted module name.
        kind: `conv` or `linear`.
        positions: Output positions (input positions of a transposed convolution) for one input, over all calls.
        kernel: Kernel size, `()` for a linear layer.
        stride: Stride, `()` for a linear layer.
        in_channels: Input channels (features) of the whole layer.
        out_channels: Output channels (features).
        groups: Convolution groups.
    """

    name: str
    kind: str
    positions: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    in_channels: int
    out_channels: int
    groups: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole layer for one input."""
        return self.positions * int(np.prod(self.kernel)) * self.out_channels * self.in_channels // self.groups


@dataclass(frozen=True, eq=False)
class Cost:
    """A resource as a closed form in the numbers of kept channels.

    Each term is a constant times two sizes, and each size is affine in the channel counts:
    `cost(n) = constant + sum_t weight_t * (a_t + A_t n) * (b_t + B_t n)`.
    All numbers are integers below 2^53, so float64 is exact.

    Attributes:
        constant: What no group changes.
        weight: `[terms]`.
        offset: `[2, terms]`, the constants a and b.
        slope: `[2, groups, terms]`, the matrices A and B.
    """

    constant: float
    weight: np.ndarray
    offset: np.ndarray
    slope: np.ndarray

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Cost of channel counts.

        Args:
            counts: `[..., groups]` channels kept per group.

        Returns:
            `[...]` float64 holding exact integers.
        """
        counts = np.asarray(counts, dtype=np.float64)
        first = self.offset[0] + counts @ self.slope[0]
        second = self.offset[1] + counts @ self.slope[1]
        return np.asarray(self.constant + (first * second) @ self.weight)


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """What can be pruned in a network, and what it costs.

    Attributes:
        groups: Prunable groups in forward order.
        fixed: Every convolution or linear layer whose outputs are left whole, with the reason.
        layers: Convolution and linear layers in forward order.
        cost: `macs` and `params` as closed forms.
    """

    groups: tuple[Group, ...]
    fixed: Mapping[str, str]
    layers: tuple[Layer, ...]
    cost: Mapping[str, Cost] = field(repr=False)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {group.name: i for i, group in enumerate(self.groups)}

    @cached_property
    def _layers_by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def full(self) -> np.ndarray:
        """Channel counts of the whole network, int64 `[groups]`."""
        return np.array([group.channels for group in self.groups], dtype=np.int64)

    def position(self, name: str) -> int:
        """Place of a group in forward order.

        Raises:
            ValueError: There is no such group.
        """
        try:
            return self._position[name]
        except KeyError:
            hint = did_you_mean(name, self._position)
            raise ValueError(f"no group is named {name!r}; {hint}known: {', '.join(self._position)}") from None

    def group(self, name: str) -> Group:
        """The group of that name; a ValueError names the closest one."""
        return self.groups[self.position(name)]

    def layer(self, name: str) -> Layer:
        """The convolution or linear layer of that module name."""
        return self._layers_by_name[name]

    def counts(self, plan: Plan) -> np.ndarray:
        """Channels that a plan keeps in each group, int64 `[groups]`."""
        counts = self.full.copy()
        for name, kept in plan.keep.items():
            counts[self.position(name)] = len(kept)
        return counts

    def macs(self, plan: Plan) -> int:
        """Multiply-accumulates of the cut network for one input."""
        return int(self.cost["macs"](self.counts(plan)))

    def params(self, plan: Plan) -> int:
        """Parameters of the cut network."""
        return int(self.cost["params"](self.counts(plan)))
