"""Dead channels: those that say the same whatever the image, and how the layers that read them do without.

A BatchNorm whose scale is zero goes on sending its shift, through the activation, to the next layer. What such a
channel says is read off the network while it runs, at every layer that reads it: whatever lies between, a pooling, a
residual sum, needs no rule of its own. A constant k_j that arrives the same everywhere is then moved:

- into the reader's bias, or the running mean of the BatchNorm right behind it: b += sum_j k_j sum_taps W[:, j], where
  the reader is linear or a convolution that pads nothing (or not with zeros);
- else, the constant being missing in the padding, into one dead channel c of the group that is kept and speaks for all:
  W[:, c] += sum_j W[:, j] k_j / k_c, which is exact at the borders, too, for the price of one channel.

In both cases W[:, j] becomes zero, so that removing channel j changes nothing. What cannot be moved stays as it is,
with the reason. Nothing here is part of a paper; nothing is trained and no data are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prune_env.pruning.activations import channels_last, watching
from prune_env.pruning.consumer import Consumer, consumers, oriented
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.surgery import CONVOLUTIONS

TOLERANCE = 1e-5
"""Relative difference up to which a channel says the same everywhere: means of equal numbers round differently."""

Dead = Mapping[str, Bool[np.ndarray, " channel"]]
"""Group name -> whether each of its channels is dead."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a layer reads at each of its input positions, over images and places of the map.

    Attributes:
        low: Least value, float64 on the CPU.
        high: Greatest value.
        weighs: Whether the layer gives it any weight.
    """

    low: Float[Tensor, " position"]
    high: Float[Tensor, " position"]
    weighs: Bool[Tensor, " position"]

    @property
    def value(self) -> Float[Tensor, " position"]:
        """The constant, where it is one."""
        return (self.low + self.high) / 2

    @property
    def constant(self) -> Bool[Tensor, " position"]:
        """Whether it is the same for all images and everywhere on the map."""
        return self.high - self.low <= TOLERANCE * torch.maximum(self.high.abs(), self.low.abs())

    @property
    def heard(self) -> Bool[Tensor, " position"]:
        """Whether it makes a difference to what the layer writes."""
        return self.weighs & ((self.low != 0) | (self.high != 0))


class Unmoved(NamedTuple):
    """Constants that a layer cannot take up itself.

    Attributes:
        slot: Where the layer reads the group.
        reason: Why it cannot.
    """

    slot: Slot
    reason: str


def sending(
    network: nn.Module, graph: LayerGraph, dead: Dead, example: Float[Tensor, "1 ..."]
) -> dict[str, Bool[np.ndarray, " channel"]]:
    """The dead channels that are not yet free to go: some layer still hears them.

    Args:
        network: It is only read.
        graph: Its graph.
        dead: The dead channels of every group.
        example: One normalised input; only its shape matters.
    """
    read = readings(network, _readers(graph), example)
    found = {group.name: np.zeros(group.channels, dtype=bool) for group in graph.groups}
    for group in graph.groups:
        for slot in group.consumers:
            found[group.name][slot.unit[read[slot.module].heard.numpy()[slot.index]]] = True
        found[group.name] &= dead[group.name]
    return found


@torch.no_grad()
def fold(network: nn.Module, graph: LayerGraph, dead: Dead, example: Float[Tensor, "1 ..."]) -> dict[str, str]:
    """Move what dead channels say into the layers that read them, in place; the network computes what it did before.

    Args:
        network: Its mode returns.
        graph: Its graph.
        dead: The dead channels of every group.
        example: One normalised input; only its shape matters.

    Returns:
        Group name -> why some of its dead channels have to stay if nothing is to change.
    """
    read, layers = readings(network, _readers(graph), example), consumers(network, graph.groups, example)
    left: dict[str, str] = {}
    for group in (group for group in graph.groups if dead[group.name].any()):
        kept, reasons = [], []
        for slot in group.consumers:
            one = read[slot.module]
            heard = torch.from_numpy(slot.positions(dead[group.name]))
            heard = heard[one.heard[heard]]
            if not one.constant[heard].all():
                reasons.append(f"{slot.module} does not read the same everywhere although nothing is left of a channel")
            fixed = heard[one.constant[heard]]
            reason = _obstacle(network, slot.module, layers.get(slot.module))
            if len(fixed) and reason is not None:
                kept.append(Unmoved(slot, reason))
            elif len(fixed):
                _take_up(network, layers[slot.module], fixed, one)
        if kept:
            reasons.append(_speak_for_all(network, group, dead[group.name], kept, read))
        if reasons:
            left[group.name] = "; ".join(reasons)
    return left


def _readers(graph: LayerGraph) -> Iterable[str]:
    return dict.fromkeys(slot.module for group in graph.groups for slot in group.consumers)


def readings(network: nn.Module, names: Iterable[str], example: Float[Tensor, "1 ..."]) -> dict[str, Reading]:
    """What layers read in evaluation mode, on noise: images might leave some part of a map alone.

    Args:
        network: It is only read.
        names: Convolutions or linear layers.
        example: One normalised input; only its shape matters.
    """
    names = tuple(names)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *example.shape[1:]))).to(example)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        values = channels_last(x.detach(), module).double().cpu().flatten(0, 1)
        low, high = values.amin(0), values.amax(0)
        before = found.get(name, (low, high))  # a layer may run more than once
        found[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    with watching(network, names, observe), torch.no_grad():
        network(noise)
    read = {}
    for name in names:
        weight = oriented(network.get_submodule(name)).transpose(0, 1).flatten(1)
        silent = torch.zeros(len(weight), dtype=torch.float64)
        read[name] = Reading(*found.get(name, (silent, silent)), weight.bool().any(1).cpu())
    return read


def _obstacle(network: nn.Module, name: str, layer: Consumer | None) -> str | None:
    """Why a layer cannot take up a constant in its bias or norm; None if it can."""
    module = network.get_submodule(name)
    if isinstance(module, CONVOLUTIONS):
        pads = module.padding == "same" if isinstance(module.padding, str) else any(module.padding)
        if pads and module.padding_mode == "zeros" and max(module.kernel_size) > 1:
            return f"{name} pads its input with zeros"
    elif not isinstance(module, nn.Linear):
        return f"{name} ({type(module).__name__}) does not weigh each place of the map alike"
    if layer is None or not layer.shifts(network):
        return f"{name} has neither a bias nor a BatchNorm right behind it"
    return None


def _take_up(network: nn.Module, layer: Consumer, at: Tensor, read: Reading) -> None:
    """Bias: b += sum_j k_j sum_taps W[:, j], and W[:, j] = 0."""
    weight = oriented(network.get_submodule(layer.name))
    at, value = at.to(weight.device), read.value[at].to(weight.device)
    columns = weight.index_select(1, at).double()
    layer.shift(network, columns.reshape(len(weight), len(at), -1).sum(2) @ value)
    weight.index_fill_(1, at, 0)


def _speak_for_all(
    network: nn.Module,
    group: Group,
    dead: Bool[np.ndarray, " channel"],
    kept: list[Unmoved],
    read: Mapping[str, Reading],
) -> str:
    """W[:, c] += sum_j W[:, j] k_j / k_c, W[:, j] = 0, for the dead channel c that says most; why it has to stay."""
    why = " and ".join(one.reason for one in kept)
    least = torch.where(torch.from_numpy(dead), torch.inf, 0.0).double()
    for one in kept:
        reading = read[one.slot.module]
        # A channel can speak for others only where it says something itself, the same everywhere.
        says = torch.where(reading.constant, reading.value.abs(), 0.0)[one.slot.index]
        least.scatter_reduce_(0, torch.from_numpy(one.slot.unit), says, "amin")
        counts = np.bincount(one.slot.unit, minlength=group.channels)
        if counts.min() < counts.max():
            return f"{why}, which reads channels of unequal size"
    speaker = int(least.argmax())
    if not 0 < float(least[speaker]) < torch.inf:
        return f"{why}, and no dead channel says something to each of its readers"
    for one in kept:
        reading, weight = read[one.slot.module], oriented(network.get_submodule(one.slot.module))
        # The k-th position of a channel is spoken for by the k-th of the speaker.
        own = torch.from_numpy(one.slot.index[np.argsort(one.slot.unit, kind="stable")].reshape(group.channels, -1))
        moved = torch.from_numpy(dead)[:, None] & (reading.heard & reading.constant)[own]
        moved[speaker] = False
        source, target = own[moved], own[speaker].expand_as(own)[moved]
        ratio = (reading.value[source] / reading.value[target]).to(weight.device)
        source, target = source.to(weight.device), target.to(weight.device)
        columns = weight.index_select(1, source).double() * ratio.view(1, -1, *[1] * (weight.dim() - 2))
        weight.index_add_(1, target, columns.to(weight.dtype))
        weight.index_fill_(1, source, 0)
    return f"{why}, so that channel {speaker} speaks for all dead ones"
